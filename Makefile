VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: test demo lint format stability estimation clean

$(STAMP): pyproject.toml setup.py cbn_convert/norm/kernels/passes.cpp
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

test: $(STAMP)
	$(PY) -m pytest

demo: $(STAMP)
	$(VENV)/bin/cbn demo -o demo --overwrite

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# long studies on ../shared/data, whose JSON is committed: about two hours and ten minutes of one core
stability: $(STAMP)
	$(PY) benchmarks/stability.py --data ../shared/data
	$(PY) benchmarks/readme.py

estimation: $(STAMP)
	$(PY) benchmarks/estimation.py --data ../shared/data

clean:
	rm -rf $(VENV) build *.egg-info demo
