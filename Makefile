# make compare   environment if missing, then train and compare the variants, and write the report
# make test      environment if missing, then lint, types and tests
PY ?= python3
V := .venv
RUN := $(V)/bin

.PHONY: compare test lint types bench clean

compare: $(V)/.ready
	$(RUN)/zoo compare quick

test: lint types
	OMP_NUM_THREADS=1 $(RUN)/pytest -n auto

lint: $(V)/.ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(V)/.ready
	$(RUN)/pyright

# Hours of training that write README's tables are asked for by name
STUDIES := benchmarks/study_small.py benchmarks/claims.py

bench: $(V)/.ready
	for script in $(filter-out $(STUDIES), $(wildcard benchmarks/*.py)); do $(RUN)/python $$script || exit 1; done

$(V)/.ready: pyproject.toml constraints.txt
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PY=/path/to/python3.11 ...'; exit 1; }
	@test -x $(RUN)/python || $(PY) -m venv $(V) || \
	  { echo 'python3 -m venv failed: on Debian and Ubuntu install the package python3-venv'; exit 1; }
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(V) build dist *.egg-info .pytest_cache .ruff_cache
