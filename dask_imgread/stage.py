"""The interface of a processing stage, modelled on that of NVIDIA NeMo Curator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True)
class Resources:
    """What a stage occupies while it runs.

    Parameters
    ----------
    cpus
        CPU cores.
    gpus
        GPUs; a fraction is a share of one.

    Raises
    ------
    ValueError
        If one of them is negative.

    Examples
    --------
    >>> Resources(gpus=0.25).requires_gpu
    True
    """

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"cpus and gpus must be at least 0, not {self.cpus}, {self.gpus}")

    @property
    def requires_gpu(self) -> bool:
        """Whether a GPU, or a share of one, is needed."""
        return self.gpus > 0


class ProcessingStage(ABC, Generic[Input, Output]):
    """A step that turns one task into a list of results.

    A stage is plain values until it runs: it can be pickled, sent to a worker, and
    called there. Calling a stage is ``process``.

    Examples
    --------
    >>> class Halve(ProcessingStage[int, int]):
    ...     name = "halve"
    ...     def process(self, task):
    ...         return [task // 2, task - task // 2]
    >>> Halve()(5)
    [2, 3]
    """

    name: str

    @property
    def resources(self) -> Resources:
        """What the stage occupies while it runs."""
        return Resources()

    @abstractmethod
    def process(self, task: Input) -> list[Output]:
        """Turn one task into results.

        Parameters
        ----------
        task
            What is to be processed.

        Returns
        -------
        list
            The results, in the order in which they are made.
        """

    def inputs(self) -> tuple[list[str], list[str]]:
        """Return what the stage needs.

        Returns
        -------
        tuple of list of str
            The names of the attributes that a task must have, and those that its items must.
        """
        return [], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Return what the stage provides.

        Returns
        -------
        tuple of list of str
            The names of the attributes that a result has, and those that its items have.
        """
        return [], []

    def __call__(self, task: Input) -> list[Output]:
        """Call ``process``, so that a stage can be passed to ``client.map``."""
        return self.process(task)
