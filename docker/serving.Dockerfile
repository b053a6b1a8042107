# The service's image: what fetches, verifies and starts a release; no model, and none of torch, MLflow or Airflow.
#
#   docker build --file docker/serving.Dockerfile --build-arg GIT_SHA="$(git rev-parse HEAD)" .
#
# BASE is any Debian with Python 3.11 and its venv module.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
COPY docker/install.sh /build/
COPY serving/requirements.lock /build/requirements.lock
# Where the building machine gets its packages is its own business: the secret is its pip configuration, if it has one.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false sh /build/install.sh /build/requirements.lock
COPY pyproject.toml README.md LICENSE /build/source/
COPY pipelines /build/source/pipelines
COPY serving /build/source/serving
COPY dags /build/source/dags
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false sh /build/install.sh --project /build/source
RUN sh /build/install.sh --slim \
    && sh /build/install.sh --compile serving.__main__ serving.service bentoml bentoml_cli.cli _bentoml_impl.worker.service onnxruntime pyarrow.parquet pyarrow.json pyarrow.compute boto3 botocore.session uvicorn uvloop

FROM ${BASE}
ARG GIT_SHA=unknown
ARG VERSION=0
LABEL org.opencontainers.image.title="perch-serving" \
      org.opencontainers.image.description="Fetches, verifies and serves a release of Perch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_SHA}"
COPY --from=build /opt/perch /opt/perch
# Everything that is written goes below /var/lib/perch and /tmp, which are volumes where the root file system is read-only.
RUN mkdir -p /var/lib/perch && chown 10001:10001 /var/lib/perch
USER 10001:10001
WORKDIR /var/lib/perch
ENV PATH=/opt/perch/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/perch \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PERCH_SERVING_HOST=0.0.0.0 \
    PERCH_SERVING_CACHE_DIR=/var/lib/perch/cache \
    PERCH_SERVING_SPOOL_DIR=/var/lib/perch/spool
VOLUME ["/var/lib/perch", "/tmp"]
EXPOSE 3000
ENTRYPOINT ["python", "-m", "serving"]
