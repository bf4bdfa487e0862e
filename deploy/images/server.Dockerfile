# The server's image, without torch and without a compiler. In the project's root:
#   docker build -f deploy/images/server.Dockerfile -t modelexpress-server:0.1.0 .
# --build-arg BASE=python:3.11-slim-bookworm@sha256:… pins the base. `make test-images` does what its RUN lines do.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/images deploy/images
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir --require-hashes -r deploy/images/build-requirements.txt
RUN python3 -m venv --without-pip /opt/mx && /opt/build/bin/pip --python /opt/mx/bin/python install --no-cache-dir --no-compile --require-hashes -r deploy/images/server-requirements.txt
COPY . .
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels . && /opt/build/bin/pip --python /opt/mx/bin/python install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="mxserver" org.opencontainers.image.description="Which worker has which model weights" org.opencontainers.image.licenses="Apache-2.0" org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 65532 mx && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /var/lib/mxserver mx && install -d -o mx -g mx /var/lib/mxserver /var/cache/mxserver
COPY --from=build /opt/mx /opt/mx
ENV PATH=/opt/mx/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MX_STORE_PATH=/var/lib/mxserver/state.sqlite3 MODEL_EXPRESS_CACHE_DIRECTORY=/var/cache/mxserver
USER 65532:65532
VOLUME ["/var/lib/mxserver", "/var/cache/mxserver"]
EXPOSE 8001 8002 9401
STOPSIGNAL SIGTERM
ENTRYPOINT ["mxserver"]
