"""Perch's behaviour: everything that the DAGs schedule, runnable without Airflow."""

__version__ = "0.1.0"
