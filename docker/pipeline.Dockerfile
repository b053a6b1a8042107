# The stages' image: everything from images to a registered and packaged model, and the `perch` command; no Airflow.
#
#   docker build --file docker/pipeline.Dockerfile --build-arg GIT_SHA="$(git rev-parse HEAD)" .
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS packages
COPY docker/install.sh /build/
COPY docker/pipeline.lock /build/requirements.lock
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false sh /build/install.sh /build/requirements.lock
RUN sh /build/install.sh --compile

FROM packages AS project
COPY pyproject.toml README.md LICENSE /build/source/
COPY pipelines /build/source/pipelines
COPY serving /build/source/serving
COPY dags /build/source/dags
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false sh /build/install.sh --project /build/source
RUN sh /build/install.sh --compile
RUN mkdir /build/own && cd /opt/perch \
    && cp -a --parents bin/perch lib/python3*/site-packages/perch-* lib/python3*/site-packages/pipelines \
    lib/python3*/site-packages/serving lib/python3*/site-packages/dags /build/own

FROM ${BASE}
# What is large and seldom changes comes first: whoever builds, pushes or pulls the next commit has this layer already.
COPY --from=packages /opt/perch /opt/perch
COPY --from=project /build/own /opt/perch
ARG GIT_SHA=unknown
ARG VERSION=0
LABEL org.opencontainers.image.title="perch-pipeline" \
      org.opencontainers.image.description="The stages of Perch, one process each" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_SHA}"
COPY dvc.yaml params.yaml /opt/perch/project/
COPY expectations /opt/perch/project/expectations
RUN ln -s /opt/perch/lib/python3.11/site-packages/pipelines /opt/perch/project/pipelines \
    && mkdir -p /var/lib/perch && chown 10001:10001 /var/lib/perch
USER 10001:10001
WORKDIR /var/lib/perch
# A commit cannot be asked for where there is no Git, nor a user's name where no file has it; and DVC keeps its locks in
# /var/tmp, which cannot be written where the root file system is read-only.
ENV PATH=/opt/perch/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/perch \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PERCH_HOME=/var/lib/perch \
    PERCH_PROJECT_DIR=/opt/perch/project \
    USER=perch \
    DVC_SITE_CACHE_DIR=/var/lib/perch/dvc-site \
    PERCH_GIT_SHA=${GIT_SHA}
VOLUME ["/var/lib/perch", "/tmp"]
ENTRYPOINT ["perch"]
