"""A run -> an ordinary full-precision model folder: merge arithmetic, a streaming safetensors writer, and the proof."""

REPORT = "export_report.json"
