import json

from pydantic import Field

from harness.evaluation.suite import SUITES, Example, Suite, SuiteConfig, SuiteResult
from harness.store.artifacts import Spec
from harness.store.files import write_atomically
from harness.store.fingerprint import fingerprint


class NextCharacterConfig(SuiteConfig):
    texts: list[str] = Field(["the quick brown fox", "to be or not to be"], description="texts to continue")


@SUITES.register("next_character", version=1, parameters=NextCharacterConfig)
class NextCharacter(Suite):
    """Is the first character that the model would write the next one of the text?"""

    name = "next_character"

    def __init__(self, config, data_root):
        self.config = config

    def task_metrics(self):
        return {"characters": "acc"}

    def identity(self):
        return {"version": 1, "texts": fingerprint(self.config.texts)}

    def measure(self, evaluated, store, costs):
        inputs = {"model": evaluated.fingerprint, **self.identity()}
        spec = Spec(self.name, evaluated.label, 1, inputs, evaluated.computing)

        def build(folder):
            lines = []
            for text in self.config.texts:
                ids = evaluated.tokenizer(text[:-1], return_tensors="pt")["input_ids"]
                answer = evaluated.tokenizer.decode(evaluated.model(ids).logits[0, -1].argmax())
                lines.append(json.dumps({"text": text, "right": answer[:1] == text[-1]}))
            write_atomically(folder / "answers.jsonl", "\n".join(lines))

        path = store.ensure(spec, build, costs.forward(evaluated.parameters, 1000))

        def examples():
            for line in map(json.loads, (path / "answers.jsonl").read_text().splitlines()):
                yield Example("characters", line["text"], "acc", float(line["right"]))

        return SuiteResult(examples, {"characters": path}, {"characters": spec.fingerprint})
