# A worker's image: your vLLM image and our package. Nothing that the image has is replaced. In the project's root:
#   docker build -f deploy/images/worker.Dockerfile --build-arg VLLM_IMAGE=vllm/vllm-openai:v0.11.0 -t vllm-with-modelexpress:0.1.0 .
# `make test-images` does what its RUN lines do.
ARG BASE=python:3.11-slim-bookworm
ARG VLLM_IMAGE

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/images deploy/images
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir --require-hashes -r deploy/images/build-requirements.txt
COPY . .
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .

FROM ${VLLM_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vllm-with-modelexpress" org.opencontainers.image.licenses="Apache-2.0" org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
USER root
COPY --from=build /wheels /opt/mx/wheels
COPY deploy/images/worker-requirements.txt deploy/images/missing_requirements.py /opt/mx/
RUN python3 /opt/mx/missing_requirements.py /opt/mx/worker-requirements.txt > /opt/mx/missing.txt && python3 -m pip install --no-cache-dir --no-deps --require-hashes -r /opt/mx/missing.txt && python3 -m pip install --no-cache-dir --no-deps --no-index /opt/mx/wheels/*.whl && rm -r /opt/mx
RUN install -d -m 1777 /home/mx /cache
ENV HOME=/home/mx HF_HOME=/cache
USER 65532:65532
