#!/bin/sh
# What is given is a command of Airflow (`scheduler`), or a whole one: Airflow's own chart gives `bash -c …`, `airflow db
# check-migrations …` and `python -m …`, and its executor what starts a task.
set -eu
case "${1:-}" in
airflow | bash | sh | python | perch) exec "$@" ;;
*) exec airflow "$@" ;;
esac
