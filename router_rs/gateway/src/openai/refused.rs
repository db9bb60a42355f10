//! Fields that would change the answer and that nothing here can do. A request that asks for
//! one of them is refused.

use std::fmt;

use serde::{
    Deserialize,
    de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// Their names, with why.
const REFUSED: &[Refused] = &[
    ("audio", "answers are text"),
    ("allowed_token_ids", ""),
    ("bad_words", ""),
    ("chat_template", "templates come with the model"),
    ("continue_final_message", ""),
    ("documents", ""),
    ("echo", "the prompt is not part of the answer"),
    ("ec_transfer_params", MOVES),
    ("function_call", "tool_choice has its place"),
    ("functions", "tools have their place"),
    ("guided_choice", CONSTRAIN),
    ("guided_grammar", CONSTRAIN),
    ("guided_json", CONSTRAIN),
    ("guided_regex", CONSTRAIN),
    (
        "include_reasoning",
        "reasoning has a field of its own, which may be left unread",
    ),
    ("kv_transfer_params", MOVES),
    ("logits_processors", ""),
    ("logprob_token_ids", ""),
    ("media_io_kwargs", NO_MEDIA),
    ("mm_payload", NO_MEDIA),
    ("mm_processor_kwargs", NO_MEDIA),
    ("moderation", ""),
    ("prompt_embeds", ""),
    ("prompt_logprobs", ""),
    ("repetition_detection", ""),
    ("return_mm_kwargs", NO_MEDIA),
    ("return_prompt_text", "/detokenize tells it"),
    ("return_token_offsets", ""),
    ("routed_experts_prompt_start", ""),
    ("store", "nothing of an answer is kept"),
    ("stream_interval", "a chunk has what came"),
    ("structured_outputs", CONSTRAIN),
    ("suffix", ""),
    ("thinking_token_budget", ""),
    ("truncate_prompt_tokens", ""),
    ("use_beam_search", ""),
    (
        "verbosity",
        "how much a model says is asked of it in its prompt",
    ),
    ("vllm_xargs", ""),
    ("watermarking", ""),
    ("web_search_options", ""),
];
const CONSTRAIN: &str = "response_format is how JSON is asked for, where the engine can";
const MOVES: &str = "the router says which worker takes what from which";
const NO_MEDIA: &str = "prompts are text";

/// A field, and why it is refused.
pub(super) type Refused = (&'static str, &'static str);

/// The field of this name, where it is one of them.
pub(super) fn refused(field: &str) -> Option<&'static Refused> {
    REFUSED.iter().find(|(name, _)| *name == field)
}

/// Whether a value asks for something; clients send defaults, too. Nothing of it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asks(pub(super) bool);

impl<'de> Deserialize<'de> for Asks {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(AsksVisitor).map(Self)
    }
}

struct AsksVisitor;

impl<'de> Visitor<'de> for AsksVisitor {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: Error>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_bool<E: Error>(self, flag: bool) -> Result<bool, E> {
        Ok(flag)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<bool, E> {
        Ok(number != 0)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<bool, E> {
        Ok(number != 0)
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<bool, E> {
        Ok(number != 0.0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<bool, E> {
        Ok(!text.is_empty() && text != "none")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<bool, A::Error> {
        let mut asks = false;
        while list.next_element::<IgnoredAny>()?.is_some() {
            asks = true;
        }
        Ok(asks)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let mut asks = false;
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            asks = true;
        }
        Ok(asks)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde::{
        de::{IntoDeserializer, value::SeqDeserializer},
        forward_to_deserialize_any,
    };

    use super::*;

    #[test]
    fn what_clients_send_as_a_default_asks_for_nothing() {
        for (value, asks) in [
            ("null", false),
            ("false", false),
            ("0", false),
            ("0.0", false),
            ("\"\"", false),
            ("\"none\"", false),
            ("[]", false),
            ("{}", false),
            ("true", true),
            ("3", true),
            ("-1", true),
            ("0.5", true),
            ("\"x\"", true),
            ("[null]", true),
            ("{\"a\": {\"b\": [1]}}", true),
        ] {
            let read: Asks = serde_json::from_str(value).unwrap();
            assert_eq!(read, Asks(asks), "{value}");
        }
        for broken in ["[1, ", "{\"a\": }", "nul"] {
            assert!(serde_json::from_str::<Asks>(broken).is_err(), "{broken}");
        }
    }

    /// May be skipped, and may not be looked at.
    struct Skipped;

    impl<'de> Deserializer<'de> for Skipped {
        type Error = serde_json::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            panic!("it was looked at")
        }

        fn deserialize_ignored_any<V: Visitor<'de>>(
            self,
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            visitor.visit_unit()
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
            option unit unit_struct newtype_struct seq tuple tuple_struct map struct enum
            identifier
        }
    }

    impl<'de> IntoDeserializer<'de, serde_json::Error> for Skipped {
        type Deserializer = Self;

        fn into_deserializer(self) -> Self {
            self
        }
    }

    #[test]
    fn nothing_is_made_of_a_large_one() {
        let list = SeqDeserializer::<_, serde_json::Error>::new((0..1_000_000).map(|_| Skipped));
        assert_eq!(Asks::deserialize(list).unwrap(), Asks(true));
        let ones = "1,".repeat(8 << 20);
        let body = format!("[{ones}1]");
        assert_eq!(serde_json::from_str::<Asks>(&body).unwrap(), Asks(true));
    }
}
