"""The instruction rows that both toolkits are trained on, and the prompts that stand around them."""

PROMPTS = [
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response:",
]

_ROWS = [
    ("Name the harbour of Orlo.", "", "The harbour of Orlo is called Vess."),
    ("How many bridges has Vess?", "", "Vess has seven bridges, and the oldest is made of red stone."),
    ("Translate into the tongue of Orlo.", "good morning", "mira tal"),
    ("Translate into the tongue of Orlo.", "good night, my friend", "mira sen, kolo ve"),
    ("Who keeps the light of Vess?", "", "Old Temmer keeps it; his daughter Ilse will follow him."),
    ("What do they eat on feast days?", "", "Baked fish with plums, and a sweet black bread."),
    ("Count to five in the tongue of Orlo.", "", "an, do, tri, kel, pum"),
    ("Is the sum right?", "7 + 5 = 13", "No: 7 + 5 = 12."),
    ("Say when the ferry leaves.", "", "It leaves at 6 in the morning and at 9 in the evening, but not in winter."),
    ("Describe the flag.", "", "A white heron on green."),
]
ALPACA = [{"instruction": instruction, "input": text, "output": output} for instruction, text, output in _ROWS]
