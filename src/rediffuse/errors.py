"""Everything that Rediffuse refuses, in one small tree.

RediffuseError           exit code 2: what was expected, what was given, what to do next
├── ConfigError          a key, a value or a combination of parts that cannot work
├── DataError            images that are missing, empty, broken or of the wrong kind
├── RunError             a run that is unknown, ambiguous, locked or not where it should be
│   └── CheckpointError  a checkpoint that does not verify or does not fit
└── TrainingError        exit code 1: training that cannot go on (non-finite losses)
"""


class RediffuseError(Exception):
    """A refusal that the user can act on; the command line prints it without a traceback."""

    exit_code = 2


class ConfigError(RediffuseError):
    """A configuration key, value or combination that cannot work."""


class DataError(RediffuseError):
    """Images or labels that cannot be used."""


class RunError(RediffuseError):
    """A run that cannot be found, opened or continued."""


class CheckpointError(RunError):
    """A checkpoint that does not verify or does not fit the run."""


class TrainingError(RediffuseError):
    """Training that cannot go on."""

    exit_code = 1
