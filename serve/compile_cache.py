"""A folder of compiled programs, so that the second start of a service does not compile them again."""

import contextlib
import pathlib
import threading
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

_SETTINGS = {
    # The programs are small and many: each is worth keeping.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_lock = threading.Lock()


@contextlib.contextmanager
def compile_cache(directory: str | pathlib.Path | None) -> Iterator[None]:
    """Keeps what is compiled inside of it in `directory`, and takes from there what was kept before.

    It is JAX's own persistent cache: its keys hold the program, the versions of jax and jaxlib, and the
    flags. Whoever can write the folder decides what is run, so it must be as trusted as the program. Its
    settings are JAX's global ones: they are put back afterwards, and programs that other threads compile
    meanwhile are kept, too. One at a time.

    Args:
      directory: created if needed; None changes nothing.
    """
    if directory is None:
        yield
        return
    path = pathlib.Path(directory).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    with _lock:
        settings = {"jax_compilation_cache_dir": str(path), **_SETTINGS}
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            _update(settings)
            yield
        finally:
            _update(before)


def _update(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # The folder that was in use stays in use until then.
    compilation_cache.reset_cache()
