# One server's image: Airflow with the DAGs, the stages that its local runner starts, the services of the slots, and Envoy.
# It is what the other three hold, in one environment; compose.yaml starts all of Perch from it.
#
#   bash docker/build.sh server
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS packages
COPY docker/install.sh /build/
# Parts of one lock: where two of them name a package, it is the same version.
COPY docker/pipeline.lock docker/airflow.lock /build/
COPY serving/requirements.lock /build/serving.lock
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    for lock in pipeline airflow serving; do sh /build/install.sh /build/$lock.lock; done
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
# What is large and seldom changes comes first: the next commit's image shares this layer.
COPY --from=packages /opt/perch /opt/perch
COPY --from=project /build/own /opt/perch
ARG GIT_SHA=unknown
ARG VERSION=0
LABEL org.opencontainers.image.title="perch-server" \
      org.opencontainers.image.description="All of Perch for one server" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_SHA}"
COPY dvc.yaml params.yaml /opt/perch/project/
COPY expectations /opt/perch/project/expectations
COPY docker/airflow-entrypoint.sh /opt/perch/bin/airflow-entrypoint.sh
# Folders that volumes are mounted at: a new volume takes owner and mode from the folder below it.
RUN ln -s /opt/perch/lib/python3.11/site-packages/pipelines /opt/perch/project/pipelines \
    && ln -s /opt/perch/lib/python3.11/site-packages/dags /opt/perch/project/dags \
    && for folder in airflow release services serving; do mkdir -p /var/lib/perch/$folder; done \
    && mkdir -p /etc/perch/keys /etc/perch/public-keys \
    && chown -R 10001:10001 /var/lib/perch /etc/perch
USER 10001:10001
WORKDIR /var/lib/perch
# No file has a name of this user, which Airflow and DVC ask for, and Docker makes up none; and DVC keeps its locks in
# /var/tmp, which cannot be written where the root file system is read-only.
ENV PATH=/opt/perch/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/perch \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/opt/perch/project \
    AIRFLOW_HOME=/var/lib/perch/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/opt/perch/project/dags \
    AIRFLOW__CORE__LOAD_EXAMPLES=False \
    PERCH_HOME=/var/lib/perch \
    PERCH_PROJECT_DIR=/opt/perch/project \
    USER=perch \
    DVC_SITE_CACHE_DIR=/var/lib/perch/dvc-site \
    PERCH_GIT_SHA=${GIT_SHA}
ENTRYPOINT ["airflow-entrypoint.sh"]
