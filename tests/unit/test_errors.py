"""Every error has three parts, survives pickling, and is caught as the standard exception that it specialises."""

from __future__ import annotations

import copy
import pickle

import pytest

from trl_atropos import errors


STANDARD_BASE = {
    errors.TrlAtroposError: Exception,
    errors.AtroposConnectionError: ConnectionError,
    errors.AtroposAnswerLost: ConnectionError,
    errors.AtroposProtocolError: ValueError,
    errors.AtroposBatchLost: ValueError,
    errors.AtroposBatchGivenAway: ValueError,
    errors.AtroposRegistrationError: RuntimeError,
    errors.AtroposDataTimeout: TimeoutError,
    errors.JournalError: OSError,
    errors.PreflightError: RuntimeError,
    errors.EpisodeError: RuntimeError,
    errors.HubUploadError: OSError,
    errors.NonFiniteGradientError: ArithmeticError,
    errors.WeightSyncError: RuntimeError,
    errors.WeightSyncTimeout: TimeoutError,
    errors.PublishConflictError: RuntimeError,
    errors.DeviceLostError: RuntimeError,
    errors.VLLMServerError: RuntimeError,
    errors.VLLMServerUnreachable: ConnectionError,
}
ALL = pytest.mark.parametrize("error_type", STANDARD_BASE, ids=lambda error_type: error_type.__name__)


def test_every_error_of_the_module_is_covered_here():
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}

    assert defined == set(STANDARD_BASE)


def test_the_tree_in_the_docstring_names_every_error():
    for error_type in STANDARD_BASE:
        assert error_type.__name__ in errors.__doc__


@ALL
def test_message_is_the_three_parts_in_order(error_type):
    error = error_type("The disk has 0 bytes left.", "Writing needs space.", "Free some.")

    assert (error.what, error.why, error.fix) == ("The disk has 0 bytes left.", "Writing needs space.", "Free some.")
    assert str(error) == "The disk has 0 bytes left. Writing needs space. Free some."


@ALL
def test_all_three_parts_are_required(error_type):
    with pytest.raises(TypeError):
        error_type("Only what happened.")


@ALL
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_type_and_parts(error_type, protocol):
    error = pickle.loads(pickle.dumps(error_type("What.", "Why.", "Fix."), protocol))

    assert type(error) is error_type
    assert (error.what, error.why, error.fix) == ("What.", "Why.", "Fix.")
    assert str(error) == "What. Why. Fix."


@ALL
def test_copying_keeps_type_and_parts(error_type):
    error = copy.deepcopy(error_type("What.", "Why.", "Fix."))

    assert type(error) is error_type
    assert str(error) == "What. Why. Fix."


@ALL
def test_is_caught_as_ours_and_as_the_standard_exception(error_type):
    for caught in (errors.TrlAtroposError, STANDARD_BASE[error_type]):
        with pytest.raises(caught):
            raise error_type("What.", "Why.", "Fix.")


def test_a_timeout_of_a_publish_is_a_weight_sync_error():
    assert issubclass(errors.WeightSyncTimeout, errors.WeightSyncError)


def test_errors_that_derive_from_oserror_take_no_errno_from_the_message():
    error = errors.JournalError("What.", "Why.", "Fix.")

    assert error.errno is None
    assert error.filename is None
