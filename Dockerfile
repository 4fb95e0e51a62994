# fastdmd as a command, with its native ops, on a CPU: `docker build -t fastdmd .`, then
# `docker run --rm -v "$PWD/runs:/work/runs" fastdmd train --out runs/digits`.
# For a GPU, a base with nvcc, of the CUDA version that torch is built for, builds the CUDA library, too:
# `docker build --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 -t fastdmd:cuda .`, and `docker run --gpus all`.
ARG BASE=python:3.12-slim
FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && { command -v python3 || apt-get install --yes --no-install-recommends python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
# FASTDMD_NATIVE=1: the libraries are built, or this fails.
RUN export PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 FASTDMD_NATIVE=1 \
    && python3 -m venv /opt/fastdmd \
    && /opt/fastdmd/bin/pip install torch setuptools cmake ninja pybind11 \
    && /opt/fastdmd/bin/pip install --no-build-isolation "/src[export]" \
    && /opt/fastdmd/bin/python /src/tools/smoke.py --native \
    && rm -rf /src/build
RUN useradd --create-home fastdmd && install --directory --owner=fastdmd /work/runs
USER fastdmd
WORKDIR /work
ENTRYPOINT ["/opt/fastdmd/bin/fastdmd"]
CMD ["--help"]
