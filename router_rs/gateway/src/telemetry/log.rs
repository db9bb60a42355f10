//! Log lines: one an event, text or JSON, to stderr. Prompts and outputs are
//! in none of them.

use tracing_subscriber::EnvFilter;

use crate::settings::Settings;

/// Sends the process's log lines to stderr as the settings say. The first call
/// in a process counts; libraries that embed a router may have their own.
pub fn init_logging(settings: &Settings) {
    let filter = EnvFilter::try_new(&settings.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let set = match settings.log_format.as_str() {
        "json" => lines.json().flatten_event(true).try_init(),
        _ => lines.try_init(),
    };
    if set.is_err() {
        tracing::debug!("the process has its own log subscriber");
    }
}
