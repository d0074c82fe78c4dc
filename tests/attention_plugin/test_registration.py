# SPDX-License-Identifier: Apache-2.0
"""Importing the package: what it registers, what it costs, and where it works."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

import attention_plugin
from attention_kernels import attention_reference
from attention_plugin import attention_forward, span_mask, support

REPOSITORY = Path(__file__).resolve().parents[2]
BEFORE = "from transformers import AttentionInterface, AttentionMaskInterface"


def in_new_process(code: str) -> Any:
    """Run Python code in a process of its own, and return what its last line printed, read as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture
def unregister():
    """Takes names that a test registers away again."""
    tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before, names = [dict(table) for table in tables], set(support.registered_names)
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    support.registered_names.clear()
    support.registered_names.update(names)


# ---------------------------------------------------------------------- registering


def test_import_registers_both_interfaces():
    assert attention_plugin.NAME == "my_triton"
    assert AttentionInterface()["my_triton"] is attention_forward
    assert AttentionMaskInterface()["my_triton"] is span_mask
    assert "my_triton" in support.registered_names


@pytest.mark.usefixtures("unregister")
def test_registering_again_is_harmless():
    implementations = len(AttentionInterface._global_mapping), len(AttentionMaskInterface._global_mapping)
    attention_plugin.register()
    attention_plugin.register()
    importlib.import_module("attention_plugin")
    assert AttentionInterface()["my_triton"] is attention_forward
    assert (len(AttentionInterface._global_mapping), len(AttentionMaskInterface._global_mapping)) == implementations


def test_importing_the_package_twice_is_harmless():
    """Thrown out of `sys.modules` and imported anew, as notebooks and test runners do."""
    code = """
import json, sys, torch, attention_plugin
from transformers import LlamaConfig, LlamaForCausalLM
for name in [name for name in sys.modules if name.split(".")[0] == "attention_plugin"]:
    del sys.modules[name]
import attention_plugin
attention_plugin.register()
sizes = dict(vocab_size=41, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="my_triton").eval()
print(json.dumps(list(model(torch.randint(5, 41, (1, 6))).logits.shape)))
"""
    assert in_new_process(code) == [1, 6, 41]


@pytest.mark.usefixtures("unregister")
@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.05}, {"softcap": 2.0}, {"scale": 1.5, "softcap": 0.5}, {"scale": 0.0}]
)
def test_register_with_options(options: dict[str, float]):
    """Options take the place of what the model passes."""
    attention_plugin.register("my_triton_variant", **options)
    query, key, value = torch.randn(3, 2, 4, 6, 8).unbind()
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    passed = {"scaling": 0.3, "softcap": 7.0}
    variant = AttentionInterface()["my_triton_variant"]
    output, _ = variant(torch.nn.Module().eval(), query, key, value, span_mask(2, 6, 6), **passed)
    expected, _ = attention_reference(
        query, key, value, mask=causal, scale=options.get("scale", 0.3), softcap=options.get("softcap", 7.0)
    )
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-5)
    assert AttentionMaskInterface()["my_triton_variant"] is span_mask
    assert AttentionInterface()["my_triton"] is attention_forward  # untouched


def tiny_llama(implementation: str, **options: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **options)
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


@pytest.mark.usefixtures("unregister")
def test_a_model_with_a_variant():
    attention_plugin.register("my_triton_flat", scale=0.01)
    tokens = torch.randint(5, 41, (2, 9))
    eager = tiny_llama("eager")
    for block in eager.model.layers:
        block.self_attn.scaling = 0.01
    logits, expected = (model(tokens).logits for model in (tiny_llama("my_triton_flat"), eager))
    assert (logits - expected).norm() < 2e-4 * expected.norm()
    assert (tiny_llama("my_triton")(tokens).logits - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.usefixtures("unregister")
def test_registering_again_replaces_the_options():
    attention_plugin.register("my_triton_variant", softcap=1.0)
    attention_plugin.register("my_triton_variant")
    assert AttentionInterface()["my_triton_variant"] is attention_forward


@pytest.mark.usefixtures("unregister")
def test_variants_refuse_the_same_models():
    from transformers import BloomConfig, BloomForCausalLM

    attention_plugin.register("my_triton_variant", softcap=1.0)
    config = BloomConfig(vocab_size=41, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="computes attention in its own code"):
        BloomForCausalLM._from_config(config, attn_implementation="my_triton_variant")


@pytest.mark.parametrize(
    "name",
    ["", "my_flash", "flash_attention_2", "paged|mine", "owner/mine", "sdpa", "eager", "flex_attention", 5, None],
)
def test_names_with_a_meaning_of_their_own(name: Any):
    before = dict(AttentionInterface._global_mapping)
    with pytest.raises(
        ValueError, match=f"`name` must be text, neither .*got {name!r}".replace("|", r"\|") + ".*my_triton_variant"
    ):
        attention_plugin.register(name)
    assert AttentionInterface._global_mapping == before


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_softcap_out_of_range(softcap: float):
    with pytest.raises(ValueError, match=f"`softcap` must be a positive number, got {softcap}"):
        attention_plugin.register("my_triton_variant", softcap=softcap)
    assert "my_triton_variant" not in AttentionInterface._global_mapping


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_scale_out_of_range(scale: float):
    with pytest.raises(ValueError, match=f"`scale` must be finite, got {scale}"):
        attention_plugin.register("my_triton_variant", scale=scale)


# ---------------------------------------------------------------------- what importing costs and brings


@pytest.fixture(scope="module")
def imports() -> list[dict[str, Any]]:
    """What importing the package did in each of several new processes, beyond the import of transformers."""
    code = f"""
import json, sys, time
start = time.perf_counter()
{BEFORE}
before = set(sys.modules)
begin = time.perf_counter()
import attention_plugin
share = (time.perf_counter() - begin) / (begin - start)
import torch
new = sorted(set(sys.modules) - before)
print(json.dumps({{"share": share, "new": new, "cuda": torch.cuda.is_initialized()}}))
"""
    return [in_new_process(code) for _ in range(3)]


def test_import_cost(imports: list[dict[str, Any]]):
    """At most a tenth of what every user of transformers has paid already: slow machines are slow in both."""
    # The least of several: tests beside this one take the processor away, and that is no cost of the import.
    assert min(run["share"] for run in imports) < 0.1


def test_what_import_leaves_alone(imports: list[dict[str, Any]]):
    for run in imports:
        assert not run["cuda"]
        packages = {name.split(".")[0] for name in run["new"]}
        assert not packages & {"vllm", "sglang", "triton", "flash_attn"}
        assert not {"attention_kernels.forward", "attention_kernels.tiles"} & set(run["new"])
        # Nothing comes along but this project and what it stands on.
        expected = {"attention_plugin", "attention_kernels", "torch", "transformers"}
        assert packages <= expected | set(sys.stdlib_module_names), sorted(packages)


def test_cpu_forward_needs_no_triton():
    """As on macOS and Windows, where there is none: importing works and CPU tensors run, and that is no fallback."""
    code = """
import json, sys, logging
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTriton())
records = []
class Collect(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("attention_kernels").addHandler(Collect())
logging.getLogger("attention_plugin").addHandler(Collect())
import importlib.util
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else original(name, package)
import torch, attention_plugin
from types import SimpleNamespace
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=41, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
tokens = torch.randint(5, 41, (2, 6))
outputs = []
for implementation in ("eager", "my_triton"):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation=implementation).eval()
    outputs.append(model(tokens).logits)
on_cpu = list(records)
from attention_kernels import paths
for _ in range(2):
    paths.runs_triton(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16))
print(json.dumps({
    "close": torch.allclose(*outputs, atol=1e-5),
    "triton": [name for name in sys.modules if name.split(".")[0] == "triton"],
    "on_cpu": on_cpu,
    "on_gpu": records[len(on_cpu):],
}))
"""
    answer = in_new_process(code)
    assert answer["close"]
    assert answer["triton"] == []
    assert answer["on_cpu"] == []
    assert len(answer["on_gpu"]) == 1 and "Triton is not installed" in answer["on_gpu"][0]


def test_many_processes_at_once(tmp_path: Path):
    """Four processes import and attend at the same time, started by multiprocessing."""
    script = tmp_path / "many_processes.py"
    script.write_text(
        """
import json, multiprocessing, os
from concurrent.futures import ProcessPoolExecutor

def attend(number):
    import attention_plugin, torch
    from transformers import AttentionInterface
    attention_plugin.register()
    query, key, value = torch.ones(3, 1, 2, 6, 8).unbind()
    mask = attention_plugin.span_mask(1, 6, 6)
    output, _ = AttentionInterface()["my_triton"](torch.nn.Module().eval(), query, key, number * value, mask)
    return [os.getpid(), float(output.mean())]

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        jobs = [pool.submit(attend, number) for number in range(4)]
        print(json.dumps([job.result() for job in jobs]))
"""
    )
    answers = in_new_process(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert [mean for _, mean in answers] == pytest.approx([0.0, 1.0, 2.0, 3.0])
