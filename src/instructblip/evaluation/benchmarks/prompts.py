"""What several benchmarks share: the prompts of the paper's appendix E, labels, decoding."""

from instructblip.evaluation.benchmarks.benchmark import Decoding

DESCRIBE = "A short image description."
ASK = "Question: {question} Short answer:"
READ = "OCR tokens: {ocr_tokens}. Question: {question} Short answer:"
CHOOSE = "Question: {question} Options: {options}. Short answer:"
CHOOSE_IN_CONTEXT = "Context: {context} Question: {question} Options: {options}. Answer:"
JUDGE = 'Based on the image, is this statement true or false? "{question}" Answer:'

TRUE_FALSE = ("true", "false")
YES_NO = ("yes", "no")

# Section 2.6 and appendix E of the paper: beams of 5 but for NoCaps (3) and OCR-VQA (1); the
# lengths and the length penalty are those of the released LAVIS configurations.
CAPTION: Decoding = {
    "num_beams": 5,
    "max_new_tokens": 80,
    "min_new_tokens": 10,
    "length_penalty": 1.0,
    "repetition_penalty": 1.15,
}
ANSWER: Decoding = {
    "num_beams": 5,
    "max_new_tokens": 10,
    "min_new_tokens": 1,
    "length_penalty": -1.0,
}
