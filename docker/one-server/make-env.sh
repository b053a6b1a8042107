#!/usr/bin/env bash
# Writes the secrets of one server, each random, into docker/.env, which only its owner reads:  make-env.sh IMAGE [FILE]
#
# A file that is there is never replaced: PostgreSQL and Airflow have taken its secrets into what they keep.
set -euo pipefail
image=${1:?usage: make-env.sh IMAGE [FILE], e.g. make-env.sh perch-server:v0.1.0-3e9d1c2}
file=${2:-$(dirname "$0")/../.env}
[ ! -e "$file" ] || { echo "perch: $file is there already, and its secrets are in use; for another image change PERCH_IMAGE in it" >&2; exit 65; }

random() { # so many bytes, in letters that no URL and no shell reads as anything else
  od -An -v -tx1 -N "$1" /dev/urandom | tr -d ' \n'
}
umask 077
draft=$(mktemp "$(dirname "$file")/.env.XXXXXX")
trap 'rm -f "$draft"' EXIT
{
  echo "# Secrets of this server; made by docker/one-server/make-env.sh.  Keep a copy: without AIRFLOW_FERNET_KEY what Airflow has encrypted is lost."
  echo "PERCH_IMAGE=$image"
  for name in POSTGRES_PASSWORD PERCH_DATABASE_PASSWORD MLFLOW_DATABASE_PASSWORD AIRFLOW_DATABASE_PASSWORD; do
    echo "$name=$(random 24)"
  done
  echo "STORE_ACCESS_KEY=perch$(random 6)"
  echo "STORE_SECRET_KEY=$(random 24)"
  for name in AIRFLOW_ADMIN_PASSWORD AIRFLOW_SCIENTIST_PASSWORD AIRFLOW_APPROVER_PASSWORD GRAFANA_ADMIN_PASSWORD; do
    echo "$name=$(random 10)"
  done
  echo "AIRFLOW_FERNET_KEY=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')"
  echo "AIRFLOW_SECRET_KEY=$(random 32)"
  echo "AIRFLOW_JWT_SECRET=$(random 48)"
} >"$draft"
mv -n "$draft" "$file"
echo "$file: the log-ins are admin, scientist and approver, their passwords AIRFLOW_*_PASSWORD; Grafana's is admin with GRAFANA_ADMIN_PASSWORD"
