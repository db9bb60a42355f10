//! Azure's traces (P. Patel et al., Splitwise, ISCA 2024): CSV with
//! TIMESTAMP, ContextTokens and GeneratedTokens. They have no prefixes;
//! [`super::give_prefixes`] makes some up.

use super::{Request, Trace, TraceError};
use kvmesh_scheduler::Class;

/// Reads a trace; ids stand for so many tokens. All blocks are different.
///
/// # Errors
/// [`TraceError`] for a line that has not these three columns.
pub fn read_azure(text: &str, block_tokens: u32) -> Result<Trace, TraceError> {
    let mut trace = Trace::new(block_tokens);
    let mut first = None;
    for (at, line) in text.lines().enumerate().skip(1) {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let bad = |what: &str| TraceError {
            line: at + 1,
            what: what.to_owned(),
        };
        let cells: Vec<&str> = line.split(',').collect();
        let [stamp, prompt, output] = cells[..] else {
            return Err(bad("three columns are expected"));
        };
        let stamp_ms = stamp_ms(stamp)
            .ok_or_else(|| bad("the time is not of the form 2023-11-16 18:17:03.9799600"))?;
        let count = |text: &str| -> Result<u32, TraceError> {
            text.parse()
                .map_err(|_| bad("token counts are whole numbers"))
        };
        let request = Request {
            arrival_ms: stamp_ms - *first.get_or_insert(stamp_ms),
            prompt: count(prompt)?,
            output: count(output)?,
            class: Class::Standard,
            blocks: 0..0,
        };
        trace.push(request, []);
    }
    trace.sort();
    Ok(trace)
}

/// Milliseconds since the month began: traces are hours long.
fn stamp_ms(text: &str) -> Option<f64> {
    let (date, time) = text.split_once(' ')?;
    let day: f64 = date.rsplit('-').next()?.parse().ok()?;
    let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    Some((((day * 24.0 + hours) * 60.0 + minutes) * 60.0 + seconds) * 1e3)
}
