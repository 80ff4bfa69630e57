"""``LLM`` is a context that loads a transformers model; the client resolves and checks its files.

Workers get a folder with a known digest and never contact a hub.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask_pcm.arguments import checked
from dask_pcm.context.bundles import bundle_of
from dask_pcm.context.context import Context
from dask_pcm.errors import ModelError
from dask_pcm.inference.fit import misfits
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.model_folder import PATTERNS, check_folder, has_code, is_encoder

if TYPE_CHECKING:
    from distributed import Client

    from dask_pcm.inference.questions.chat import Message
    from dask_pcm.inference.questions.reply import Reply
    from dask_pcm.inference.questions.stream import Stream

#: The files to download from a hub.
_PATTERNS = (*PATTERNS, "*.safetensors")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class LLM(Context):
    """A context that loads a language model; pass it to ``classify``, ``generate`` or ``embed``.

    A function of your own (``map_partitions``) is given a ``LanguageModel``, whose methods of the
    same names take lists of texts.

    Parameters
    ----------
    model : str or path-like
        A folder with a transformers model, or a model id on the Hugging Face hub. The client
        resolves an id to a commit and downloads it; workers read the files and never contact a hub.
    revision : str, optional
        Branch, tag or commit of a hub model.
    dtype : str, default "auto"
        Dtype of the weights: "auto" (as stored), "float32", "bfloat16" or "float16".
    device : str, optional
        "auto" (or None) uses the accelerator assigned to the worker, and raises an error if torch
        cannot use it. It uses the CPU if no accelerator is assigned, or if
        ``pcm.worker.accelerator`` is "cpu". "cpu" uses the CPU everywhere.
    trust_remote_code : bool, default False
        Whether code in the folder may be run, here and on workers, for models that transformers
        does not know itself. Without it, such a folder is refused.
    deterministic : bool, default False
        Whether a row's result is the same to the last bit in any batch, on any worker and at any
        attempt, on the same kind of device with the same versions. Then each forward has 16 rows
        (one, in a mixture of experts) of a length that is rounded up to a multiple of 32, however
        few there are, and no engine computes it, so it takes longer. It is of use in half
        precision, where the order in which numbers are summed may change an answer; in float32 the
        same tokens are chosen without it. Measured on a CPU, not yet on a GPU.
    name, device_memory
        As in ``Context``. `device_memory` is the size of the weights by default, in bytes, and 0 on
        the CPU.

    Raises
    ------
    ModelError
        If the folder is missing, incomplete, corrupt or quantised, the model is neither a causal
        language model nor an encoder, or the id cannot be resolved.

    Notes
    -----
    The digest of the context covers the content of the files, not their location: copies of the
    same files are the same context. Each file is hashed once, and the hash is cached. Workers stage
    the files (see ``Context``). Hub tokens are used on the client only and are sent nowhere else.
    """

    __slots__ = ("commit", "is_encoder", "path")
    path: str
    #: Whether its tokens see those after them, so that it only embeds texts.
    is_encoder: bool
    commit: str

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = "auto",
        trust_remote_code: bool = False,
        deterministic: bool = False,
        name: str | None = None,
        device_memory: int | str | None = None,
    ) -> None:
        if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
            raise ModelError(f"LLM needs a model folder or a hub id; found {model!r}.")
        if dtype not in _DTYPES:
            raise ModelError(f"dtype must be one of {', '.join(_DTYPES)}; found {dtype!r}.")
        flags = {"trust_remote_code": trust_remote_code, "deterministic": deterministic}
        for flag, value in flags.items():
            if not isinstance(value, bool):
                raise ModelError(f"{flag} must be True or False; found {value!r}.")
        path, commit = _resolve(os.fspath(model), revision, trust_remote_code)
        weights = check_folder(path, trust_remote_code)
        embeds_only, runs_code = is_encoder(path), trust_remote_code and has_code(path)
        more = ("*.py",) if runs_code else ()
        files = bundle_of(path, (*PATTERNS, *more, *(file.name for file in weights)))
        # Only its own code knows which tensors a model needs; workers check that.
        wrong = [] if runs_code else misfits(path, weights, files.digest, embeds_only)
        if wrong:
            raise ModelError(
                f"The weights in {str(path)!r} do not match its config.json:"
                f" {'; '.join(wrong)}. Copy or download the folder again."
            )
        name = name or Path(os.fspath(model)).name
        is_on_device = device != "cpu"
        kind: dict[str, Any] = {"is_encoder": True} if embeds_only else {}
        if deterministic:
            kind["deterministic"] = True
        if runs_code:  # its classes cannot be found by another process
            kind.update(runs_code=True, reattach=False)
        memory = _bytes_of(weights) if device_memory is None and is_on_device else device_memory
        super().__init__(
            load_model,
            str(path),
            files=[files],
            dtype=dtype,
            device=device or "auto",
            content=files.digest,
            name=name,
            device_memory=memory,
            exclusive=False,
            **kind,
        )
        commit = commit or files.digest
        about = (("model", os.fspath(model)), ("commit", commit))
        object.__setattr__(self, "ref", replace(self.ref, about=about))
        object.__setattr__(self, "path", str(path))
        object.__setattr__(self, "is_encoder", embeds_only)
        object.__setattr__(self, "commit", commit)

    @checked
    def ask(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = (),
        chat: bool | None = None,
        timeout: float | str | None = None,
        progress: bool = True,
        client: Client | None = None,
    ) -> Reply:
        """Ask the model a question, while its workers are busy or idle, and wait for the answer.

        A worker that holds the model answers at once, beside its tasks. If there is none, one loads
        the model first. An answer goes on elsewhere if its worker is lost.

        Parameters
        ----------
        prompt : str or list of messages
            A text is the message of a user, if the model has a chat template, else the whole
            prompt. Messages are ``{"role": "user", "content": "…"}``. Control tokens in them act
            as such.
        max_tokens, temperature, top_k, top_p, seed, stop
            As for ``generate``.
        chat : bool, optional
            False takes a text as the whole prompt, and True as a message of a chat.
        timeout : float or str, optional
            Seconds that the answer may take at most, the wait for a worker included.
        progress : bool, default True
            Whether to show the answer while it arrives, in a notebook or on a terminal.
        client
            A client of the cluster; the current one if left out.

        Returns
        -------
        Reply
            ``str(reply)`` is its text.

        Raises
        ------
        PromptError
            The prompt has more tokens than the model takes, messages are malformed, or the model
            has no chat template for them; or an option is out of its range.
        AskError
            The forward of the question failed, or every worker that answered it was lost.
        LoadError, DeviceMemoryError
            The model cannot be loaded, or fits no device.
        InstallError
            There is no client, or no toolkit on its cluster.
        TimeoutError
            There is no answer in time.
        """
        from dask_pcm.inference.questions.stream import IN_LOOP, whole

        return whole(
            self._asked(
                prompt,
                client=client,
                instead=IN_LOOP,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop=stop,
                chat=chat,
                timeout=timeout,
                shows_text=True,
                progress=progress,
            )
        )

    @checked
    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = (),
        chat: bool | None = None,
        timeout: float | str | None = None,
        progress: bool = True,
        client: Client | None = None,
    ) -> Stream:
        """Ask the model a question, and get the answer in pieces as it is computed.

        Parameters
        ----------
        prompt, max_tokens, temperature, top_k, top_p, seed, stop, chat, timeout, client
            As for ``ask``; the client may be asynchronous.
        progress : bool, default True
            Whether to show what the question waits for.

        Returns
        -------
        Stream
            For ``for piece in stream`` and ``async for piece in stream``. The pieces together are
            the text of ``stream.reply``, which is there at the end. Leaving the loop ends the
            answer.

        Raises
        ------
        PromptError, InstallError
            As ``ask``; its other errors are raised by the loop.

        Examples
        --------
        >>> async for piece in llm.stream("Why is the sky blue?"):  # doctest: +SKIP
        ...     print(piece, end="")
        """
        return self._asked(
            prompt,
            client=client,
            instead="",
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            chat=chat,
            timeout=timeout,
            shows_text=False,
            progress=progress,
        )

    def _asked(self, prompt: Any, *, client: Client | None, instead: str, **options: Any) -> Stream:
        """Ask a question; `instead` is what to do with an asynchronous client."""
        from dask_pcm.inference.calls.prompted import encoder_refused
        from dask_pcm.inference.questions.stream import open_stream
        from dask_pcm.plugins.install import current_client

        if self.is_encoder:
            raise encoder_refused("ask", repr(self.name))
        found = current_client(client, instead)
        return open_stream(self.ref, prompt, client=found, folder=self.path, **options)


def _resolve(model: str, revision: str | None, has_code: bool) -> tuple[Path, str]:
    """The local folder of a model, and its hub commit; an empty commit for a plain folder."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(
                f"{model!r} is a folder and has no revisions; found revision={revision!r}."
            )
        return path.resolve(), ""
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"There is no model folder {model!r}. Pass a folder with config.json, tokenizer and"
            " weights, or a hub id with its owner, such as 'HuggingFaceTB/SmolLM2-1.7B-Instruct' or"
            " 'openai-community/gpt2'."
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_PATTERNS, *["*.py"] * has_code]
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"{model!r} is not a local folder, and could not be resolved on the hub"
            f" ({type(error).__name__}: {error})."
        ) from error
    return folder, folder.name  # the hub's cache names a snapshot's folder by its commit


def _bytes_of(files: Sequence[Path]) -> int:
    """The total size of files in bytes."""
    return sum(file.stat().st_size for file in files)
