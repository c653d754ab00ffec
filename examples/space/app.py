"""The page of `iedit demo` as a Hugging Face Space. Its settings (README.md) are variables of the Space."""

import os

from diffusers_iedit.demo import serve


serve(
    model=os.environ.get("MODEL_ID", "mini"),
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    max_megapixels=float(os.environ.get("MAX_MEGAPIXELS", "40")),
)
