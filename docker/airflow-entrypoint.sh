#!/bin/sh
# What is given is a command of Airflow (`scheduler`), or a whole one: Airflow's own chart gives `bash -c …`, `airflow db
# check-migrations …` and `python -m …`, and its executor what starts a task.
set -eu
# Airflow's simple log-in opens its file for writing, which a mounted Secret does not let it: it gets a copy.
if [ -n "${AIRFLOW_LOGINS_FROM:-}" ] && [ -f "$AIRFLOW_LOGINS_FROM" ]; then
  (umask 077 && cat "$AIRFLOW_LOGINS_FROM" >"$HOME/passwords.json")
fi
case "${1:-}" in
airflow | bash | sh | python | perch) exec "$@" ;;
*) exec airflow "$@" ;;
esac
