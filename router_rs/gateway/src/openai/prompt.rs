//! What a completion continues, read as it stands in a body: a list of ids takes the room of
//! its ids, whoever wrote them.

use std::fmt;

use serde::{
    Deserialize,
    de::{Deserializer, Error, IgnoredAny, SeqAccess, Unexpected, Visitor},
};

use super::ask::MAX_CHOICES;

/// What to continue.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

/// What a prompt may be, for who sent another thing.
const EXPECTED: &str = "text, token ids, or a list of either; ids are whole numbers from 0";

/// One of a list. The first says what the others are.
enum Element {
    Id(u32),
    Text(String),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(PromptVisitor)
    }
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ElementVisitor)
    }
}

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Text(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Prompt, E> {
        Ok(Prompt::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
        let mut prompt = match list.next_element()? {
            None => return Ok(Prompt::Ids(Vec::new())),
            Some(Element::Id(id)) => Prompt::Ids(vec![id]),
            Some(Element::Text(text)) => Prompt::Texts(vec![text]),
            Some(Element::Ids(ids)) => Prompt::IdLists(vec![ids]),
        };
        while prompt.count() <= MAX_CHOICES {
            let Some(next) = list.next_element()? else {
                return Ok(prompt);
            };
            match (&mut prompt, next) {
                (Prompt::Ids(ids), Element::Id(id)) => ids.push(id),
                (Prompt::Texts(texts), Element::Text(text)) => texts.push(text),
                (Prompt::IdLists(lists), Element::Ids(ids)) => lists.push(ids),
                _ => return Err(A::Error::custom(EXPECTED)),
            }
        }
        // One more than may be answered: the call is refused for that.
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(prompt)
    }
}

impl Prompt {
    /// How many prompts it is.
    fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Ids(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::IdLists(lists) => lists.len(),
        }
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
        u32::try_from(id)
            .map(Element::Id)
            .map_err(|_| E::invalid_value(Unexpected::Unsigned(id), &self))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Text(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Element, E> {
        Ok(Element::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
        let mut ids = Vec::new();
        while let Some(element) = list.next_element()? {
            let Element::Id(id) = element else {
                return Err(A::Error::custom(EXPECTED));
            };
            ids.push(id);
        }
        Ok(Element::Ids(ids))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::cell::Cell;

    use serde::de::value::SeqDeserializer;
    use serde_json::{Value, json};

    use super::*;

    fn read(prompt: &str) -> Result<Prompt, serde_json::Error> {
        serde_json::from_str(prompt)
    }

    #[test]
    fn each_kind_of_prompt_is_read() {
        let texts = ["a", "é"].map(str::to_owned).to_vec();
        for (body, expected) in [
            ("\"a \\u00e9\"", Prompt::Text("a é".to_owned())),
            ("[]", Prompt::Ids(vec![])),
            ("[0, 4294967295]", Prompt::Ids(vec![0, u32::MAX])),
            ("[\"a\", \"\\u00e9\"]", Prompt::Texts(texts)),
            (
                "[[1, 2], [], [3]]",
                Prompt::IdLists(vec![vec![1, 2], vec![], vec![3]]),
            ),
        ] {
            assert_eq!(read(body).unwrap(), expected, "{body}");
        }
    }

    #[test]
    fn what_is_no_prompt_is_told_what_one_is() {
        for body in [
            "7",
            "true",
            "{\"a\": 1}",
            "[1, -2]",
            "[1.5]",
            "[4294967296]",
            "[1, \"a\"]",
            "[\"a\", 1]",
            "[[1], 2]",
            "[[1], [\"a\"]]",
            "[[[1]]]",
            "[null]",
        ] {
            let error = read(body).unwrap_err();
            assert!(error.is_data(), "{body}: {error}");
            assert!(error.to_string().contains(EXPECTED), "{body}: {error}");
        }
        for body in ["[1, ", "[1 2]", "[\"a]", "[[1]"] {
            assert!(!read(body).unwrap_err().is_data(), "{body}");
        }
    }

    #[test]
    fn a_list_is_read_element_by_element_and_not_kept_until_its_kind_is_known() {
        let seen = Cell::new(0);
        let list = (0..1_000_000).map(|at: u32| {
            seen.set(seen.get() + 1);
            if at == 1 { json!("a") } else { json!(at) }
        });
        let list = SeqDeserializer::<_, serde_json::Error>::new(list);
        assert!(Prompt::deserialize(list).is_err());
        assert_eq!(seen.get(), 2);
        let all: Vec<Value> = (0..1_000_000).map(|at: u32| json!(at)).collect();
        let Ok(Prompt::Ids(ids)) = read(&Value::from(all).to_string()) else {
            panic!("ids");
        };
        assert!(ids.into_iter().eq(0..1_000_000));
    }

    #[test]
    fn of_more_prompts_than_may_be_answered_one_is_kept() {
        let lists = format!("[{}]", vec!["[7]"; 100_000].join(","));
        assert_eq!(read(&lists).unwrap().count(), MAX_CHOICES + 1);
        let texts = format!("[{}]", vec!["\"\""; 100_000].join(","));
        assert_eq!(read(&texts).unwrap().count(), MAX_CHOICES + 1);
        // And what stands behind them is still JSON.
        assert!(read(&lists.replace("7]]", "7]")).is_err());
    }
}
