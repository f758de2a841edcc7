"""llama.cpp: one server for each model that is in use, in this process, on a loopback port of its own.

The only module that imports xllamacpp. It knows files and ports; names, tokens and OpenAI's manners are the
gateway's.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

SLOTS = 8  # requests that are computed side by side; more than these wait in llama.cpp's queue
CONTEXT = 2048  # tokens of one request, prompt and answer; SmolLM2 was trained for 8192, memory is the limit
EMBEDDING_CONTEXT = 512  # tokens of one text


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
            params.n_parallel = 4
            params.n_ctx = params.n_batch = params.n_ubatch = 4 * EMBEDDING_CONTEXT
        else:
            params.n_parallel = SLOTS
            params.n_ctx = SLOTS * CONTEXT
            # A context for each slot. In a shared one, what other requests left behind changes how sums are
            # grouped and so how they round: the same request would not always give the same answer.
            params.kv_unified = False
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0
        if adapters:
            params.lora_adapters = [_adapter(xllamacpp, path) for path in adapters]
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

    `load(name)` makes an Engine, and may raise; two callers that ask for one name at once share one start.
    """

    def __init__(self, load: Callable[[str], Engine]) -> None:
        self._load = load
        self._running: dict[str, Engine] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Engine:
        """The engine of model `name`, started where it is not running."""
        with self._lock:
            if name not in self._running:
                self._running[name] = self._load(name)
            return self._running[name]

    def close(self) -> None:
        """Stop all engines; the next `get` starts them again."""
        with self._lock:
            while self._running:
                self._running.popitem()[1].close()
