"""The exceptions a caller can meet; every message names the place, the value and the remedy."""


class KbvqError(Exception):
    """Base of all errors raised on purpose by kbvq."""


class ConfigError(KbvqError):
    """An option, or a combination of options, that kbvq does not support."""


class UnsupportedModelError(KbvqError):
    """The model is not a mixture of experts that kbvq can quantize."""


class CalibrationError(KbvqError):
    """The calibration text, or the statistics gathered from it, cannot be used."""


class NumericalError(KbvqError):
    """A weight or a statistic is not finite, or a factorisation failed."""


class CheckpointError(KbvqError):
    """A checkpoint on disk is missing, damaged, or not what was asked for."""


class RanksError(KbvqError):
    """The processes of one run have lost each other."""
