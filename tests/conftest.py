"""Eight virtual CPU devices, so that every sharding test runs on any machine."""

import atexit
import logging
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Tests compile many equal programs: each is compiled once in a process. A folder of its own, for JAX does not lock it.
_PROGRAMS = tempfile.mkdtemp(prefix="jaxembed-tests-")
atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

_HURRIES = jax.config.read("jax_disable_most_optimizations")
#: Whose results are compared with those of TensorFlow or torch, or of training to the bit, which contracted multiplications
#: and additions change. Whole files: each switch clears what was compiled.
_COMPARED = {
    *("test_lookup_oracle.py", "test_lookup_parity.py", "test_optimizers_parity.py"),
    *("test_saved_model.py", "test_tensorflow.py", "test_torchrec.py"),
    *("test_quantization.py", "test_quantized_bits.py"),
}

hypothesis.settings.register_profile("default", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _compiled_as_users_do(request):
    """What is compared so is compiled at length, whatever `make test` says of others."""
    hurries = _HURRIES and request.node.path.name not in _COMPARED
    if hurries != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()  # which do not tell programs apart by this
        jax.config.update("jax_disable_most_optimizations", hurries)


@pytest.fixture(autouse=True)
def _logs_as_before():
    """What `jaxembed serve` makes of its loggers in this process ends with the test."""
    loggers = [logging.getLogger(name) for name in ("jaxembed.server", "uvicorn.error")]
    before = [(log.handlers[:], log.propagate, log.level) for log in loggers]
    yield
    for log, (handlers, propagate, level) in zip(loggers, before, strict=True):
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)
