VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

INTEGRATIONS := .venv-integrations

.PHONY: data docs package test test-oldest test-integrations examples third-party test-gpu gpu demo lint format bench-cpu bench-gpu estimation study dense sweep chaos training clean

$(STAMP): pyproject.toml setup.py cbn_convert/norm/kernels/passes.cpp
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

# processes of one thread each: small tensors gain nothing from more; three on two cores, since some tests wait
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadgroup

# with the oldest torch that pyproject.toml allows, and a numpy of its time, which Triton's interpreter needs
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml setup.py cbn_convert/norm/kernels/passes.cpp
	test -x $(OLDEST)/bin/python || python3 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[dev]' torch==2.6.0 torchvision==0.21.0 'numpy<2.2'
	touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 3 --dist loadgroup

# in an environment of its own, which shares the torch of the other one
$(INTEGRATIONS)/.installed: $(STAMP)
	test -x $(INTEGRATIONS)/bin/python || python3 -m venv $(INTEGRATIONS)
	$(PY) -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$($(INTEGRATIONS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tests.pth
	$(INTEGRATIONS)/bin/python -m pip install --quiet --editable '.[integrations]'
	touch $@

# the real frameworks; `make test` skips what it does not find
test-integrations: $(INTEGRATIONS)/.installed
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest -n 2 --dist loadgroup tests/integrations tests/test_examples.py tests/deploy/test_load_folded.py

# the recipes, with CBN and with what it replaces
examples: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -m benchmarks.coverage.examples --data ../shared/data

# models of other libraries; facenet-pytorch runs with any torch, but asks for one of 2024
third-party: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -m pip install --quiet --editable '.[integrations,third-party]'
	$(INTEGRATIONS)/bin/python -m pip install --quiet --no-deps facenet-pytorch
	$(INTEGRATIONS)/bin/python -m benchmarks.coverage.third_party

# on a machine with a GPU: the kernels compiled instead of interpreted, and the layer on CUDA
test-gpu: $(STAMP)
	$(PY) -m pytest tests/norm

# source archive and wheel in build/dist, and the wheel tried in another environment and folder; it shares torch
WHEEL := build/wheel-environment
package: $(STAMP)
	$(PY) -m pip install --quiet build
	rm -rf build/dist
	$(PY) -m build --outdir build/dist
	python3 -m venv --clear $(WHEEL)
	$(PY) -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$($(WHEEL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(WHEEL)/bin/python -m pip install --quiet --no-deps build/dist/*.whl
	cd build && wheel-environment/bin/python ../tests/installed.py

# README, docs/, docstrings and --help as a site, in build/site; every link in it leads somewhere, or this fails
docs: $(STAMP)
	$(PY) -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

demo: $(STAMP)
	$(VENV)/bin/cbn demo -o demo --overwrite

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# about 25 minutes on a machine that does nothing else; README's and docs/performance.md's tables come from the JSON
bench-cpu: $(STAMP)
	$(PY) -m benchmarks.speed.step_time --again
	$(PY) -m benchmarks.speed.bounds
	$(PY) -m benchmarks.documents.readme

bench-gpu: $(STAMP)
	$(PY) -m benchmarks.speed.step_time --device cuda --again
	$(PY) -m benchmarks.documents.readme

# all that needs a GPU, in less than nine minutes; no environment is made, since the machine may have no package index:
# `pip install --no-deps --no-build-isolation -e .` comes first. GPU_REPORT is where the JSON goes
GPU_PYTHON ?= python3
GPU_REPORT ?= benchmarks/results/gpu.json
gpu:
	$(GPU_PYTHON) -m benchmarks.speed.gpu --output $(GPU_REPORT)

# images and weights of the figures from their public sources; what is there already is left alone
data: $(STAMP)
	$(PY) -m benchmarks.data.fetch --to ../shared/data

# every timm architecture with BatchNorm through tests/helpers/promises.py: an hour and a half on two cores that do nothing else
# (an estimate); it goes on where it was stopped, so that `python -m benchmarks.coverage.sweep --failed` is enough after a change
sweep: $(STAMP)
	$(PY) -m benchmarks.coverage.sweep
	$(PY) -m benchmarks.coverage.sweep --onnx
	$(PY) -m benchmarks.documents.coverage

# runs that are killed and resumed, and damaged files
chaos: $(STAMP)
	$(PY) -m benchmarks.robustness.chaos
	$(PY) -m benchmarks.documents.reliability

# what docs/training.md and examples/README.md say
training: $(STAMP)
	$(PY) -m benchmarks.study.auto_lr --data ../shared/data
	$(PY) -m benchmarks.study.statistics_shift --data ../shared/data
	$(PY) -m benchmarks.speed.loader --data ../shared/data/clothing
	$(VENV)/bin/torchrun --nproc-per-node 2 -m benchmarks.speed.communication
	$(PY) -m benchmarks.coverage.recipes --data ../shared/data
	$(PY) -m benchmarks.documents.training

# docs/results.md and tables of docs/experiments.md: hundreds of runs, most of a day on two cores; it goes on where it
# was stopped
study: $(STAMP)
	$(PY) -m benchmarks.study.comparisons --data ../shared/data --work study
	$(PY) -m benchmarks.study.time_to_accuracy --data ../shared/data
	$(PY) -m benchmarks.documents.results
	$(PY) -m benchmarks.documents.choose
	$(PY) -m benchmarks.study.from_scratch --data ../shared/data
	$(PY) -m benchmarks.study.carried_forms --data ../shared/data
	$(PY) -m benchmarks.documents.readme

# detection and segmentation, in the environment of the integrations: about two hours of one core for each task
dense: $(INTEGRATIONS)/.installed
	for task in camvid-unet "camvid-deeplab --treatments bn,frozen+bn,frozen+gn,cbn" bccd-fcos \
		"bccd-faster-rcnn --treatments frozen+gn@1,frozen+gn@3,frozen+gn,cbn+gn@10,bn@1" \
		"camvid-unet --treatments cbn@1,frozen+bn@1" \
		"bccd-fcos-long --treatments frozen+gn,cbn+gn,frozen+gn@1,cbn+gn@1,frozen+gn@3,cbn+gn@10" \
		"bccd-fcos-long --treatments frozen+gn@1,frozen+gn@3,cbn+gn@10 --batch-sizes 1" \
		"bccd-fcos-long --treatments frozen+gn@3,cbn+gn@10,frozen+gn@1 --batch-sizes 4" \
		"bccd-faster-rcnn-long --treatments frozen+gn@3,cbn+gn@10,frozen+gn,frozen+gn@1" \
		"bccd-faster-rcnn --treatments frozen+gn@3,cbn+gn@10,frozen+gn@1,frozen+gn --batch-sizes 4" \
		"camvid-deeplab --treatments bn,frozen+bn,cbn --batch-sizes 4" \
		"neu-fcos --treatments frozen+gn@1,cbn+gn@10"; do \
		OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m benchmarks.dense.run --data ../shared/data --task $$task || exit; done
	$(INTEGRATIONS)/bin/python -m benchmarks.dense.report

estimation: $(STAMP)
	$(PY) -m benchmarks.study.estimation --data ../shared/data

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(OLDEST) build *.egg-info demo
