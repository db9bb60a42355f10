"""How old a step is, as routers hear it: by that they know a stuck engine."""

from engine_harness import Driver, StepClock, prompt, sim

from kvmesh.engine.contract import EngineLoad


class SlowClock(StepClock):
    """A machine whose cores are shared: what should take a while takes three."""

    def sleep_until(self, moment: float) -> None:
        super().sleep_until(self.time + 3 * max(0.0, moment - self.time))


class Listener(Driver):
    """Keeps what each report says of the running step."""

    loads: list[EngineLoad]

    def step(self, output) -> None:
        self.loads.append(output.load)
        super().step(output)


async def test_a_step_is_no_older_for_those_that_ran_between_its_layers() -> None:
    clock = StepClock()
    engine = sim(blocks=4_000, profile="cpu-135m", speed=1, clock=clock)
    driver = Listener(engine)
    driver.loads = []
    urgent = []

    def come() -> None:
        urgent.extend(
            driver.place(prompt(600, seed), deadline_ms=0, max_tokens=1) for seed in range(1, 6)
        )

    # At the end of a layer, while the engine's thread has the long prompt's step.
    clock.passes.append(come)
    engine.start(driver)
    try:
        long = driver.place(prompt(600), deadline_ms=1e9, max_tokens=1)
        await long.ended()
        assert len(urgent) == 5
        assert all([await attempt.ended() == "finished" for attempt in urgent])
    finally:
        await engine.close()
    held = [load for load in driver.loads if load.step_age_ms and load.kv.running > 0]
    assert held, "nothing was said while a step was held"
    assert clock.time > 1 + 5 * max(load.step_predicted_ms for load in held) / 1000
    for load in held:
        assert load.step_age_ms <= load.step_predicted_ms * 1.001


class Stopwatch(Driver):
    """Keeps what is told of each step before it, and what it took: milliseconds."""

    told: list[float]
    took: list[float]

    def begin_step(self, predicted_ms: float) -> None:
        self.told.append(predicted_ms)

    def step(self, output) -> None:
        if output.sample is not None:
            self.took.append(output.sample.duration_us / 1e3)
        super().step(output)


async def test_a_machine_that_has_become_slower_tells_how_long_steps_take_now() -> None:
    engine = sim(blocks=4_000, profile="cpu-135m", speed=1, clock=SlowClock())
    driver = Stopwatch(engine)
    driver.told, driver.took = [], []
    engine.start(driver)
    try:
        prompts = [driver.place(prompt(600, seed), max_tokens=1) for seed in range(1, 8)]
        assert all([await attempt.ended() == "finished" for attempt in prompts])
    finally:
        await engine.close()
    late = [took / told for told, took in zip(driver.told, driver.took, strict=True)]
    # By the fit of the warm-up the first takes three times as long as was told; by
    # what the last ones took the others do not.
    assert len(late) > 12
    assert late[0] > 2.5
    assert max(late[10:]) < 1.3


async def test_steps_take_ten_times_as_long_while_a_file_says_so(tmp_path) -> None:
    slow = tmp_path / "slow"
    engine = sim(profile="step-10ms", speed=1, clock=StepClock(), slow_while=str(slow))
    driver = Driver(engine)
    engine.start(driver)
    try:
        took_ms = {}
        for is_slow in (False, True, False):
            if is_slow:
                slow.touch()
            before = len(driver.samples)
            assert await driver.place(prompt(40), max_tokens=4).ended() == "finished"
            slow.unlink(missing_ok=True)
            steps = driver.samples[before:]
            assert len(steps) == 4
            took_ms[is_slow] = {round(step.duration_us / 1000) for step in steps}
    finally:
        await engine.close()
    assert took_ms == {False: {10}, True: {100}}
