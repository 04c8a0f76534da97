"""What can go wrong outside a conversation: whose fault it is, and whether waiting helps.

    WorkerError
    ├── ConfigurationError    the operator's: exit 2, the message says what to change
    │   └── TopologyError     the broker does not fit these settings; the same remedy
    ├── LinkLost              nobody's: the broker went away; try again
    └── LinkSilent            nobody's, and trying again did not help: exit 1, to be started afresh

What goes wrong with a command is no exception but a word of `core.verdict`.
"""


class WorkerError(Exception):
    """Base of all errors of the worker."""


class ConfigurationError(WorkerError):
    """The settings are wrong or incomplete. The text names the setting and the remedy."""


class TopologyError(ConfigurationError):
    """The broker's topology contradicts the settings, or could lose or reorder commands."""


class LinkLost(WorkerError):  # noqa: N818 - it names what happened, as ConnectionReset does
    """The connection to the broker, or a part of it, went away."""


class LinkSilent(WorkerError):  # noqa: N818 - as above
    """Connections stand, and pass nothing on."""
