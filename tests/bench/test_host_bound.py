"""Times that the host may have taken are marked in what `bench` shows."""

from bench_samples import sample_case

from lora_kernels.bench.show import tables


def test_times_that_may_be_the_host_s_are_marked():
    ahead, behind = sample_case(), sample_case()
    ahead["providers"]["ours"]["seconds"]["both"] |= {"host_median": 0.001, "spin_median": 0.003}
    behind["providers"]["ours"]["seconds"]["both"] |= {"host_median": 0.0025, "spin_median": 0.003}
    assert tables.host_bound([ahead]) == []
    assert tables.host_bound_words([ahead]) == ""
    found = {"case": 1, "provider": "ours", "pass": "both", "host": 0.0025}
    assert tables.host_bound([ahead, behind]) == [found]
    words = tables.host_bound_words([ahead, behind])
    assert words.startswith("1 times are marked (host)")
    assert "(lora_kernels [triton])" in words
    shown = [tables.with_spread(case["providers"]["ours"]["seconds"]["both"]) for case in (ahead, behind)]
    assert [text.endswith("% (host)") for text in shown] == [False, True]
