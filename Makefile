# `make` alone lists the targets.
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help env demo demo-faults up down status check format test test-unit test-slow cluster-test compose-test images test-images lock bench bench-serving bench-serving-large soak bench-pneumonia clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 26

env: $(VENV)/.installed ## Make the environment from the lock file
$(VENV)/.installed: requirements.lock pyproject.toml scripts/make-environment.sh
	@bash scripts/make-environment.sh $(VENV)

demo: env ## Train digits for two weeks in a real Airflow and release both models (DEMO_EXIT=1 does not stay up)
	@$(BIN)/perch demo

demo-faults: env ## Release five bad models on this machine, and see which gate stops each (5 minutes)
	@$(BIN)/perch demo --faults

up: env ## Start MLflow and Airflow
	@$(BIN)/perch up
down: env ## End them
	@$(BIN)/perch down
status: env ## Show what runs
	@$(BIN)/perch status

check: env ## Format, lint, types, import rules, stray large or secret files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/perch params >/dev/null

format: env ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: env ## All tests that CI runs (real Airflow, MLflow, PostgreSQL included)
	$(BIN)/pytest -m "not slow and not cluster and not compose"
test-unit: env ## The fast tests
	$(BIN)/pytest -m "not slow and not services and not cluster and not compose"
test-slow: env ## The long ones
	$(BIN)/pytest -m slow
cluster-test: env ## Train in pods and release on a real Kubernetes that is started for it (root; skipped where it cannot be)
	@bash scripts/cluster-test.sh $(BIN)/python $(CLUSTER_TESTS)
compose-test: env ## Run one server as a whole on a Docker Engine that is started for it (root; skipped where it cannot be)
	@bash scripts/compose-test.sh $(BIN)/python

bench: env ## Ingestion, one training epoch, the DAG, and a million predictions, each against its baseline
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/training_epoch.py
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python -m benchmarks.predictions
bench-serving: env ## Perch's service beside other ways to serve the same model (wrk, 20 minutes)
	$(BIN)/python -m benchmarks.serving
bench-serving-large: env ## One image through EfficientNet-B4, by threads and precision
	$(BIN)/python -m benchmarks.serving_large
soak: env ## Thirty minutes of good, bad and slow clients, a shutdown and a kill (SOAK_MINUTES=30)
	$(BIN)/python -m benchmarks.soak --minutes $(or $(SOAK_MINUTES),30)
bench-pneumonia: env ## Five seeds on PneumoniaMNIST, beside the published table
	$(BIN)/python benchmarks/pneumonia.py

images: env ## Build the images serving, pipeline and airflow with buildah or Docker (BASE=… TAG=…)
	@bash docker/build.sh
test-images: env ## Build them, and run each as a cluster would (root, scripts/debian-packages.sh --images)
	$(BIN)/pytest tests/integration/test_images.py

lock: env ## Resolve pyproject.toml into requirements.lock
	@bash scripts/make-lock.sh $(VENV)

clean: ## Remove the environment and everything runs have left
	-@$(BIN)/perch down 2>/dev/null
	rm -rf $(VENV) .perch
