"""MLflow and Airflow on one machine."""
