from nvvl.export.checks import Check, summarize

CHECKS = [
    Check(rule=rule, name=f"name of {rule}", passed=passed, detail=detail, servers=servers)
    for rule, passed, detail, servers in [
        ("C1", True, "ok", ("vLLM", "SGLang")),
        ("C2", False, "x: wrong", ("vLLM",)),
        ("N1", None, "needs the source", ("vLLM", "SGLang")),
        ("N2", None, "needs the source", ("vLLM",)),
        ("E1", False, "y: wrong", ("TensorRT-LLM",)),
        ("V1", False, "z: wrong", ()),
    ]
]


def test_summary_counts_names_failures_and_what_was_not_checked() -> None:
    assert summarize("vLLM", CHECKS) == [
        "vLLM: 1 of 4 rules hold",
        "FAILS C2 (name of C2): x: wrong",
        "not checked: N1, N2",
    ]
    assert summarize("TensorRT-LLM", CHECKS) == [
        "TensorRT-LLM: 0 of 1 rules hold",
        "FAILS E1 (name of E1): y: wrong",
    ]
    assert summarize("Edge-LLM", CHECKS) == ["Edge-LLM: 0 of 0 rules hold"]
