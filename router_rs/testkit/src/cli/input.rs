//! Standard input, line by line.

use std::io::{self, BufRead};

use tokio::sync::mpsc;

/// Lines read ahead of the one that takes them.
const AHEAD: usize = 64;

/// Lines as they come; the channel closes where standard input does.
///
/// # Errors
/// Where no thread can be started.
pub(super) fn lines() -> io::Result<mpsc::Receiver<String>> {
    let (to, lines) = mpsc::channel(AHEAD);
    // A thread, since a blocking read cannot be given up: it ends with the
    // process.
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            for line in io::stdin().lock().lines().map_while(Result::ok) {
                if to.blocking_send(line).is_err() {
                    return;
                }
            }
        })?;
    Ok(lines)
}
