# Airflow's image: the scheduler's parts with the DAGs, and the `perch` command for what computes nothing (approvals, the
# release engine); stages run in the pipeline's image.
#
#   docker build --file docker/airflow.Dockerfile --build-arg GIT_SHA="$(git rev-parse HEAD)" .
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
COPY docker/install.sh /build/
COPY docker/airflow.lock /build/requirements.lock
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false sh /build/install.sh /build/requirements.lock
COPY pyproject.toml README.md LICENSE /build/source/
COPY pipelines /build/source/pipelines
COPY serving /build/source/serving
COPY dags /build/source/dags
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false sh /build/install.sh --project /build/source
RUN sh /build/install.sh --compile

FROM ${BASE}
ARG GIT_SHA=unknown
ARG VERSION=0
LABEL org.opencontainers.image.title="perch-airflow" \
      org.opencontainers.image.description="Airflow with the DAGs of Perch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_SHA}"
COPY --from=build /opt/perch /opt/perch
COPY dvc.yaml params.yaml /opt/perch/project/
COPY docker/airflow-entrypoint.sh /opt/perch/bin/airflow-entrypoint.sh
RUN ln -s /opt/perch/lib/python3.11/site-packages/pipelines /opt/perch/project/pipelines \
    && ln -s /opt/perch/lib/python3.11/site-packages/dags /opt/perch/project/dags \
    && mkdir -p /var/lib/perch && chown 10001:10001 /var/lib/perch
USER 10001:10001
WORKDIR /var/lib/perch
# Airflow does not start as a user whom nothing names, and no file has a name of this one.
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
    PERCH_GIT_SHA=${GIT_SHA}
VOLUME ["/var/lib/perch", "/tmp"]
ENTRYPOINT ["airflow-entrypoint.sh"]
