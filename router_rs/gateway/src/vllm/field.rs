//! Fields of our own request by their names in vLLM's.

use crate::error::{RequestError, Violations};

/// Says of a grammar what the worker's capabilities say.
const CANNOT_CONSTRAIN: &str = "the engine of this model cannot constrain its output";

/// Ours and theirs; what is under ours is under theirs.
pub(super) type Names = &'static [(&'static str, &'static str)];

/// An error that names fields as its client knows them.
pub(super) fn renamed(error: RequestError, names: Names) -> RequestError {
    let all = |Violations(mut all): Violations| {
        for violation in &mut all {
            violation.field = name(&violation.field, names);
        }
        Violations(all)
    };
    match error {
        RequestError::Invalid(violations) => RequestError::Invalid(all(violations)),
        RequestError::OverContext(violations) => RequestError::OverContext(all(violations)),
        RequestError::Unsupported { field, words } => RequestError::Unsupported {
            words: match words.as_str() {
                "" if field.starts_with("grammar") => CANNOT_CONSTRAIN.to_owned(),
                _ => words,
            },
            field: name(&field, names),
        },
        error => error,
    }
}

fn name(field: &str, names: Names) -> String {
    let under = |(ours, theirs): &(&'static str, &'static str)| {
        let rest = field.strip_prefix(ours)?;
        let whole = rest.is_empty() || rest.starts_with(['.', '[']);
        whole.then(|| (ours.len(), format!("{theirs}{rest}")))
    };
    let longest = names.iter().filter_map(under).max_by_key(|found| found.0);
    longest.map_or_else(|| field.to_owned(), |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::{super::engine_ask, super::inference_ask, *};

    #[test]
    fn fields_have_the_names_that_clients_sent() {
        for (ours, engine, inference) in [
            ("sampling.top_p", "sampling_params.top_p", "sampling.top_p"),
            (
                "sampling.temperature",
                "sampling_params.temperature",
                "temperature",
            ),
            (
                "sampling.logit_bias[3].bias",
                "sampling_params.logit_bias[3].bias",
                "decoding.logit_bias[3].bias",
            ),
            (
                "stopping.stop[0]",
                "sampling_params.stop[0]",
                "stopping.stop_strings[0]",
            ),
            (
                "stopping.stop_token_ids",
                "sampling_params.stop_token_ids",
                "stopping.stop_token_ids",
            ),
            (
                "stopping.max_tokens",
                "sampling_params.max_tokens",
                "stopping.max_new_tokens",
            ),
            (
                "output.logprobs",
                "sampling_params.logprobs",
                "response.output_candidates",
            ),
            (
                "token_ids.ids[7]",
                "tokenized.input_ids[7]",
                "token_ids.ids[7]",
            ),
            ("prompt", "text", "text"),
            (
                "grammar",
                "sampling_params.constraint",
                "decoding.structured_output",
            ),
            ("n", "sampling_params.n", "sampling.num_sequences"),
        ] {
            assert_eq!(name(ours, engine_ask::NAMES), engine);
            assert_eq!(name(ours, inference_ask::NAMES), inference);
        }
    }
}
