"""llama.cpp: one server for each model that is in use, in this process, on a loopback port of its own.

The only module that imports xllamacpp. It knows files and ports; names, tokens and OpenAI's manners are the
gateway's.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SLOTS = 8  # requests that are computed side by side; more than these wait in llama.cpp's queue
CONTEXT = 2048  # tokens of one request, prompt and answer; SmolLM2 was trained for 8192, memory is the limit
EMBEDDING_CONTEXT = 512  # tokens of one text
TUNED = 3  # engines of fine-tuned models that are kept in memory


class Engine:
    """A loaded model behind llama.cpp's HTTP server.

    file: a GGUF model. name: what replies carry as `model`. kind: "chat" or "embedding". adapters: GGUF LoRA
    files that are applied to every request. key: what the server asks for as a bearer token. `address` is the
    server's root, such as http://127.0.0.1:40123. An answer does not depend on what else is computed.
    Raises RuntimeError where llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, name: str, kind: str, adapters: Sequence[Path] = (), *, key: str) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.model_alias = {name}
        params.verbosity = 0
        params.api_keys = [key]
        params.n_threads_http = 64
        params.cache_ram_mib = 0
        if kind == "embedding":
            params.embedding = True
            # One text at a time: side by side they share a batch, and its size changes how sums round.
            params.n_parallel = 1
            params.n_ctx = params.n_batch = params.n_ubatch = EMBEDDING_CONTEXT
        else:
            params.n_parallel = SLOTS
            params.n_ctx = SLOTS * CONTEXT
            # A context for each slot. In a shared one, what other requests left behind changes how sums are
            # grouped and so how they round: the same request would not always give the same answer.
            params.kv_unified = False
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0
        if adapters:
            params.lora_adapters = [_adapter(xllamacpp, path) for path in adapters]
        self.adapters = tuple(adapters)
        self.headers = {"authorization": f"Bearer {key}"}
        self._server = xllamacpp.Server(params)
        self.address = self._server.listening_address

    def close(self) -> None:
        """Stop the server and give its memory back."""
        self._server = None


def _adapter(xllamacpp, path: Path):
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(path), 1.0
    return adapter


class Engines:
    """The engines in use, each started when it is first asked for.

    `load(name)` makes an Engine, and may raise; two callers that ask for one name at once share one start. At
    most TUNED engines with adapters are kept: of more, those are closed that nobody uses, the least recently
    asked for first.
    """

    def __init__(self, load: Callable[[str], Engine]) -> None:
        self._load = load
        self._running: dict[str, Engine] = {}  # the most recently asked for comes last
        self._users: Counter[str] = Counter()
        self._starting = threading.Lock()
        self._lock = threading.Lock()  # for the two above; never held for long

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside, the engine of model `name` is not closed."""
        with self._lock:
            self._users[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]

    def get(self, name: str) -> Engine:
        """The engine of model `name`, started where it is not running. For use inside `use`."""
        if engine := self._found(name):
            return engine
        with self._starting:
            if engine := self._found(name):
                return engine
            engine = self._load(name)
            with self._lock:
                self._running[name] = engine
                tuned = [name for name, one in self._running.items() if one.adapters]
                unused = [name for name in tuned if not self._users[name]]
            self._close(unused[: max(len(tuned) - TUNED, 0)])
        return engine

    def _found(self, name: str) -> Engine | None:
        with self._lock:
            if engine := self._running.pop(name, None):
                self._running[name] = engine
            return engine

    def _close(self, names: Sequence[str]) -> None:
        with self._lock:
            unused = [name for name in names if name in self._running and not self._users[name]]
            engines = [self._running.pop(name) for name in unused]
        for engine in engines:
            engine.close()

    def drop(self, name: str) -> None:
        """Stop the engine of a model that is no more; one that is in use ends with its last user."""
        self._close([name])
        with self._lock:
            self._running.pop(name, None)

    def close(self) -> None:
        """Stop all engines that nobody uses; the next `get` starts them again."""
        self._close(list(self._running))
