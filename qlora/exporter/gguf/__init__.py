"""GGUF for llama.cpp and a Modelfile for Ollama, each proven; optional."""
