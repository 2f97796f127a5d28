# docker build -t qlora .                                for NVIDIA cards; the host needs the NVIDIA container toolkit
# docker build -t qlora:cpu --build-arg DEVICE=cpu .
# docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" -v qlora-cache:/cache qlora train recipe.yaml
#
# The versions are those of constraints.txt, which the tests run with.
ARG PYTHON_VERSION=3.12
ARG DEVICE=cuda

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY constraints.txt ./

FROM base AS torch-cpu
RUN pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch

FROM base AS torch-cuda
# triton compiles with it on the first step; the wheels bring CUDA's own libraries
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install -c constraints.txt torch

FROM torch-${DEVICE}
COPY . .
RUN pip install -c constraints.txt . && rm -rf /src
# a user of the host, who is not known here, has these instead of a home
ENV HOME=/cache USER=qlora HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
RUN mkdir -m 1777 /cache /work
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["qlora"]
CMD ["--help"]
