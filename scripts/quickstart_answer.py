"""Ask the exported model one question with nothing but transformers: python scripts/quickstart_answer.py FOLDER"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
MESSAGES = [
    {"role": "system", "content": "Turn the message into JSON."},
    {"role": "user", "content": "Could you pencil in a bilingual garden tour with Maya Lindqvist on the 5th of March 2027, "
                                "at half past three in the afternoon?"},
]  # fmt: skip

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs.to(model.device), max_new_tokens=80, do_sample=False)
print(MESSAGES[-1]["content"])
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
