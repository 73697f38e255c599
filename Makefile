# Verbs only; what they do is in the files they call. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: demo digits digits-guided few-steps control classics test check gpu docs pictures site clean

demo: $(READY)  ## train the shipped recipe on the built-in model, then score it
	$(BIN)/python examples/demo.py

digits: $(READY)  ## train a model of digits from scratch, draw from it, have the drawings judged
	$(BIN)/python examples/digits.py

digits-guided: $(READY)  ## after it: digits by class, by both ways of guidance
	$(BIN)/python examples/digits.py guided

control: $(READY)  ## networks that follow edges, a model that edits, new words; fails under its bars
	$(BIN)/python examples/control.py

few-steps: $(READY)  ## after digits: both models in four, two and one steps, in each way of distillation, measured
	$(BIN)/python examples/few_steps.py

classics: $(READY)  ## the decoder of the built-in model learns stars and hearts, a CLIP learns shapes, a prior and a decoder its space; fails under their bars
	$(BIN)/python examples/classics.py

test: $(READY)  ## the tests: offline, on the CPU
	$(BIN)/python -m pytest -n auto --dist worksteal

check: $(READY)  ## what CI runs: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist worksteal

gpu: $(READY)  ## what only a GPU can tell, in ten minutes; without one its rows are skipped by name
	$(BIN)/python bench/gpu.py

docs: $(READY)  ## write the generated tables anew, and the pictures of runs that are there
	$(BIN)/python tools/make_docs.py
	$(BIN)/python tools/make_pictures.py

pictures: $(READY)  ## the same pictures, after training what they show
	$(BIN)/python tools/make_pictures.py --train

site: $(READY)  ## the documentation as a website in build/site; a broken link stops it
	test -x $(BIN)/zensical || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m tools.make_site

clean:  ## remove the environment, builds and caches; runs stay
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
	find sdtune tests tools -name __pycache__ -prune -exec rm -rf {} +

# Done again only when what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
