"""The page of `qlora chat --web`: base and tuned side by side on one question, and a blind vote. By gradio.

It asks nobody else: no analytics, no shared link, no fonts or scripts of other hosts, which the browser is also told not to load.
"""

from __future__ import annotations

import functools
import importlib.util
import os

from ..evaluation.sampling import Sampling
from ..jobs.talking.side_by_side import SideBySide
from ..jobs.talking.votes import SIDES, TIE
from ..system.errors import InputError
from ..system.extras import how_to_install

_FONT = ["system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]
_CSS = (
    ".gradio-container { max-width: 1200px !important; margin: 0 auto !important } footer { display: none !important }"
)
_POLICY = "; ".join([
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "font-src 'self' data:",
    "worker-src 'self' blob:",
    "connect-src 'self' data: blob:",
    "frame-ancestors 'self'",
])  # fmt: skip
LOCAL = "127.0.0.1"
_PORTS = range(7860, 7880)


def refuse_without_gradio():
    """Raise InputError unless gradio is installed."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError(f"--web needs the package gradio; install it:  {how_to_install('web')}")


def serve(compared: SideBySide, sampling: Sampling, system=None, host=LOCAL, port=None):
    """Start the page in a thread; return (its address, a function that stops it). port: None for the first that is free.

    Raises:
        InputError: the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    middleware = [Middleware(_Policy)]
    if host == LOCAL:  # else a page of another host could have its name lead here
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=[LOCAL, "localhost"]))
    page = _page(compared, sampling, system)
    ports = _PORTS if port is None else [port]
    for number in ports:
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=number,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                footer_links=[],
                theme=gradio.themes.Base(font=_FONT, font_mono=_MONO),
                css=_CSS,
                app_kwargs={"middleware": middleware},
            )
        except OSError:
            continue
        return address, functools.partial(page.close, verbose=False)
    taken = f"port {port} is" if port is not None else f"ports {_PORTS.start} to {_PORTS.stop - 1} are"
    raise InputError(f"{taken} in use or not allowed on {host}; give another one with --port")


class _Policy:
    """Tells the browser to load nothing from elsewhere."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def sending(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, sending if scope["type"] == "http" else send)


def _page(compared, sampling, system):
    """Return the page as a gradio.Blocks."""
    import gradio as gr

    with gr.Blocks(analytics_enabled=False, title=f"{compared.name} and its base") as page:
        gr.Markdown(
            f"### {compared.name} beside its base\nEach question stands alone. Which answer is whose is drawn anew."
        )
        state = gr.State(None)
        prompt = gr.Textbox(
            label="Question", lines=3, autofocus=True, placeholder="Enter asks, Shift+Enter is a new line"
        )
        with gr.Row():
            ask = gr.Button("Ask", variant="primary")
            stop = gr.Button("Stop")
            blind = gr.Checkbox(True, label="Blind", info="only then a vote counts", min_width=140)
        with gr.Row():
            boxes = [gr.Textbox(label=side.title(), lines=10, max_lines=30, interactive=False) for side in SIDES]
        with gr.Row():
            choices = {SIDES[0]: "Left is better", TIE: "Tie", SIDES[1]: "Right is better"}
            votes = [gr.Button(said, interactive=False) for said in choices.values()]
        tally = gr.Markdown(compared.votes.in_words())
        settings = _settings(sampling, system)
        shown = [state, *boxes, *votes, tally]
        gr.on(
            [ask.click, prompt.submit],
            functools.partial(_asked, compared),
            [prompt, blind, *settings],
            shown,
            api_name="ask",
        )
        for button, better in zip(votes, choices, strict=True):
            button.click(functools.partial(_voted, compared, better), state, shown, api_name=f"vote_{better}")
        stop.click(lambda question: question and question.stopped.set(), state, api_name="stop")
    return page


def _settings(sampling, system):
    """Return the components of the settings: the system message, and what `_sampling` takes."""
    import gradio as gr

    with gr.Accordion("Settings", open=False):
        system_box = gr.Textbox(system or "", label="System message")
        with gr.Row():
            return [
                system_box,
                gr.Number(sampling.max_new_tokens, label="max_new_tokens", precision=0),
                gr.Number(sampling.temperature, label="temperature (0: the likeliest token)"),
                gr.Number(sampling.top_p, label="top_p"),
                gr.Number(sampling.top_k, label="top_k (0: all)", precision=0),
                gr.Textbox("" if sampling.seed is None else str(sampling.seed), label="seed (empty: drawn)"),
            ]


def _asked(compared, text, is_blind, system_text, *settings):
    """Yield what changes on the page while a question is answered."""
    import gradio

    try:
        question = compared.ask(text, system_text, _sampling(settings), is_blind)
        labels = [side.title() if is_blind else who for side, who in zip(SIDES, question.order, strict=True)]
        said = dict.fromkeys(SIDES, "")
        yield question, *_boxes(said, labels), *_votes(False), compared.votes.in_words()
        for side, text_so_far in compared.answers(question):
            said[side] = text_so_far
            yield question, *_boxes(said, labels), *[gradio.skip()] * 4
        yield question, *_boxes(said, labels), *_votes(is_blind and question.is_answered), gradio.skip()
    except InputError as error:
        raise _said(error) from None


def _voted(compared, better, question):
    """Return what changes on the page with a vote: whose answers these are."""
    try:
        compared.vote(question, better)
    except InputError as error:
        raise _said(error) from None
    labels = [f"{side.title()}: {who}" for side, who in zip(SIDES, question.order, strict=True)]
    texts = {side: question.answers[who] for side, who in zip(SIDES, question.order, strict=True)}
    return question, *_boxes(texts, labels), *_votes(False), compared.votes.in_words()


def _said(error):
    """Return the error that gradio shows on the page, and does not print."""
    import gradio

    return gradio.Error(str(error), duration=None, print_exception=False)


def _boxes(texts, labels):
    import gradio

    return [gradio.update(value=texts[side], label=label) for side, label in zip(SIDES, labels, strict=True)]


def _votes(are_open):
    import gradio

    return [gradio.update(interactive=are_open)] * 3


def _sampling(settings):
    """Return the Sampling of what stands in the settings."""
    most, temperature, top_p, top_k, seed = settings
    named = {"max_new_tokens": most, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    missing = [name for name, value in named.items() if value is None]
    if missing:
        raise InputError(f"{', '.join(missing)}: give a number")
    return Sampling().typed(f"seed={seed.strip() or 'none'}").changed(**named)
