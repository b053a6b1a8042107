"""What the DAG files share: stages as tasks, the trigger form, notices."""
