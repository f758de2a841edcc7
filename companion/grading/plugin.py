"""A pytest plugin over nbval, for learners' notebooks: `pytest --nbval -p companion.grading.plugin`.

nbval compares all that a cell puts out, numbers cells differently from release to release, waits out the
whole timeout for a kernel that died, lets comments in a cell decide what is compared, and after a timeout
fails all that follows. Here a case is named after its cell, and passes where the cell ended well and, if it
is a check cell, emitted what the stored output says; `run.Replay` runs the cells. At a notebook's end its
outcomes are written to a file. What a case says of a failure holds no word of the learner's.
"""

import ctypes
import os
import signal
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbval.plugin import IPyNbCell, IPyNbFile

from companion.grading import run
from companion.grading.backcheck import agrees, result
from companion.grading.release import is_check


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a grading session, which `run` gives."""
    group = parser.getgroup("grading", "Grading")
    group.addoption("--grading-work", help="The session's folder, with the kernelspec in it.")
    group.addoption("--grading-results", help="Where the result files go.")


def pytest_configure(config: pytest.Config) -> None:
    """End with the process that started this one: a grader that is killed leaves nothing running."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    """Put a graded notebook in the place of nbval's."""
    found = yield
    if not any(isinstance(one, IPyNbFile) for one in found):
        return found
    return [GradedNotebook.from_parent(parent, path=file_path)]


class GradedNotebook(IPyNbFile):
    """A learner's notebook, restored, with the reference's results as its check cells' outputs."""

    def collect(self):
        """A case for each code cell, named by grade_id or cell id; comments and tags do not count."""
        self.nb = nbformat.read(self.path, as_version=4)
        cells = [cell for cell in self.nb.cells if cell.cell_type == "code"]
        for number, cell in enumerate(cells):
            name = cell.metadata.get("nbgrader", {}).get("grade_id", cell.id)
            made = GradedCell.from_parent(self, name=name, cell_num=number, cell=cell, options={})
            made.user_properties.append(("cell", cell.id))
            yield made
        self.graded = [cell.metadata.get("nbgrader", {}).get("grade_id") for cell in cells]
        self.sources = [cell.source for cell in cells]
        self.learners = {number for number, cell in enumerate(cells) if not is_check(cell)}

    def setup(self) -> None:
        """Get ready; a kernel is started when the first cell needs it."""
        self.place = tempfile.TemporaryDirectory(dir=self.config.option.grading_work)
        specs = KernelSpecManager(
            kernel_dirs=[f"{self.config.option.grading_work}/kernels"], ensure_native_kernel=False
        )
        cpu, worker = None, os.environ.get("PYTEST_XDIST_WORKER", "")
        if worker and hasattr(os, "sched_getaffinity"):
            cpus = sorted(os.sched_getaffinity(0))
            cpu = cpus[int(worker.removeprefix("gw")) % len(cpus)]

        def start() -> run.Kernel:
            return run.Kernel(specs, self.place.name, cpu)

        self.replay = run.Replay(self.sources, start, self.config.option.nbval_cell_timeout, self.learners)

    def teardown(self) -> None:
        """End the kernel, and write the outcomes if they are complete."""
        self.replay.stop()
        self.place.cleanup()
        if len(self.replay.outcomes) == len(self.sources):
            outcomes = {
                name: one for name, one in zip(self.graded, self.replay.outcomes, strict=True) if name
            }
            run.write(
                Path(self.config.option.grading_results, f"{self.path.stem}.json"), run.to_json(outcomes)
            )


class GradedCell(IPyNbCell):
    """A code cell: a case that passes or fails."""

    def setup(self) -> None:
        """Nothing: nbval would excuse what fails after a timeout."""

    def runtest(self) -> None:
        """Run the cell, and compare what it emitted with the stored output. Raises where they differ."""
        outcome = self.parent.replay.outcome(self.cell_num)
        if outcome.status != "ok":
            pytest.fail(f"{self.name}: {outcome.status}", pytrace=False)
        if is_check(self.cell) and not agrees(outcome.emitted, result(self.cell)):
            pytest.fail(f"{self.name}: it did not emit what the solution emits", pytrace=False)

    def repr_failure(self, excinfo: pytest.ExceptionInfo) -> str:
        """What happened, without the cell's source and outputs."""
        return excinfo.exconly() if excinfo.errisinstance(RuntimeError) else str(excinfo.value)
