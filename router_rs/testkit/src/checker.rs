//! Checks that a client's stream keeps the promise: accepted first, every
//! index once and in order, the right tokens, `finished` last.

use kvmesh_wire::v1::{FinishReason, GenerateResponse, Tokens, generate_response::Event};
use tonic::{Code, Status, Streaming};

use crate::tokens::TokenFunction;

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message without an event.
    #[error("a message holds no event")]
    Empty,
    /// Another event came before `accepted`.
    #[error("the first event is not `accepted`")]
    NotAcceptedFirst,
    /// `accepted` came again.
    #[error("`accepted` came twice")]
    AcceptedTwice,
    /// An index is missing or comes again.
    #[error("tokens begin at index {got}, not at {expected}")]
    Index {
        /// The next index.
        expected: u32,
        /// The index that came.
        got: u32,
    },
    /// Not the token of the mock worker's function.
    #[error("token {got} at index {index}, not {expected}")]
    Token {
        /// Output index.
        index: u32,
        /// What the function says.
        expected: u32,
        /// What came.
        got: u32,
    },
    /// More tokens than were asked for.
    #[error("{0} tokens are more than were asked for")]
    TooMany(u32),
    /// A message with neither ids nor text.
    #[error("a `tokens` message is empty")]
    EmptyTokens,
    /// The text is not that of the tokens.
    #[error("the text is {got:?}, not {expected:?}")]
    Text {
        /// Text of the tokens.
        expected: String,
        /// What came.
        got: String,
    },
    /// Something came after `finished`.
    #[error("an event came after `finished`")]
    AfterFinished,
    /// `finished` does not say what came.
    #[error("`finished` counts {got} output tokens, {expected} came")]
    Usage {
        /// Tokens that came.
        expected: u32,
        /// Tokens counted.
        got: u32,
    },
    /// OK without `finished`.
    #[error("the stream ended without `finished` and without a status")]
    NoEnd,
}

/// What a stream was that broke no promise.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// Tokens that came.
    pub tokens: u32,
    /// Why it finished; `None` where a status ended it.
    pub finished: Option<FinishReason>,
    /// The status that ended it; `Ok` where it finished.
    pub code: Code,
    /// Messages with tokens.
    pub messages: u32,
}

/// Checks one stream, event by event.
#[derive(Debug)]
pub struct StreamChecker {
    tokens: TokenFunction,
    prompt: Vec<u32>,
    max_tokens: u32,
    checks_text: bool,
    accepted: bool,
    next: u32,
    messages: u32,
    text: String,
    finished: Option<FinishReason>,
}

impl StreamChecker {
    /// A checker for the answer to `prompt`, at most `max_tokens` long, text
    /// included.
    #[must_use]
    pub fn new(tokens: TokenFunction, prompt: Vec<u32>, max_tokens: u32) -> Self {
        Self {
            tokens,
            prompt,
            max_tokens,
            checks_text: true,
            accepted: false,
            next: 0,
            messages: 0,
            text: String::new(),
            finished: None,
        }
    }

    /// Leaves the text unchecked: it was not asked for.
    #[must_use]
    pub fn without_text(mut self) -> Self {
        self.checks_text = false;
        self
    }

    /// Reads a stream to its end and checks it.
    ///
    /// # Errors
    /// The first promise that the stream breaks.
    pub async fn read(
        mut self,
        mut stream: Streaming<GenerateResponse>,
    ) -> Result<Checked, Violation> {
        loop {
            match stream.message().await {
                Ok(Some(message)) => self.observe(message)?,
                Ok(None) => return self.end(None),
                Err(status) => return self.end(Some(&status)),
            }
        }
    }

    /// Takes one message.
    ///
    /// # Errors
    /// The promise that it breaks.
    pub fn observe(&mut self, message: GenerateResponse) -> Result<(), Violation> {
        let event = message.event.ok_or(Violation::Empty)?;
        if self.finished.is_some() {
            return Err(Violation::AfterFinished);
        }
        if !self.accepted && !matches!(event, Event::Accepted(_)) {
            return Err(Violation::NotAcceptedFirst);
        }
        match event {
            Event::Accepted(_) if self.accepted => Err(Violation::AcceptedTwice),
            Event::Accepted(_) => {
                self.accepted = true;
                Ok(())
            }
            Event::Placed(_) => Ok(()),
            Event::Tokens(tokens) => self.observe_tokens(&tokens),
            Event::Finished(finished) => {
                self.text.push_str(&finished.text);
                let counted = finished
                    .usage
                    .as_ref()
                    .map_or(0, |usage| usage.output_tokens);
                if counted != self.next {
                    return Err(Violation::Usage {
                        expected: self.next,
                        got: counted,
                    });
                }
                self.finished = Some(finished.reason());
                self.check_text()
            }
        }
    }

    fn observe_tokens(&mut self, tokens: &Tokens) -> Result<(), Violation> {
        if tokens.ids.is_empty() && tokens.text.is_empty() {
            return Err(Violation::EmptyTokens);
        }
        if tokens.first_index != self.next && !tokens.ids.is_empty() {
            return Err(Violation::Index {
                expected: self.next,
                got: tokens.first_index,
            });
        }
        let seed = TokenFunction::seed(&self.prompt);
        for got in &tokens.ids {
            let expected = self.tokens.at(seed, self.next);
            if *got != expected {
                return Err(Violation::Token {
                    index: self.next,
                    expected,
                    got: *got,
                });
            }
            self.next += 1;
        }
        if self.next > self.max_tokens {
            return Err(Violation::TooMany(self.next));
        }
        self.messages += 1;
        self.text.push_str(&tokens.text);
        Ok(())
    }

    fn check_text(&self) -> Result<(), Violation> {
        let expected = self.tokens.expected_text(&self.prompt, self.next);
        if self.checks_text && self.text != expected {
            return Err(Violation::Text {
                expected,
                got: self.text.clone(),
            });
        }
        Ok(())
    }

    /// Takes the end of the stream: its status, or `None` for OK.
    ///
    /// # Errors
    /// Where a stream that ended with OK did not finish.
    pub fn end(self, status: Option<&Status>) -> Result<Checked, Violation> {
        if status.is_none() && self.finished.is_none() {
            return Err(Violation::NoEnd);
        }
        Ok(Checked {
            tokens: self.next,
            finished: self.finished,
            code: status.map_or(Code::Ok, Status::code),
            messages: self.messages,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kvmesh_wire::v1::{Accepted, Finished, Usage};

    use super::*;

    const PROMPT: [u32; 2] = [3, 4];

    fn checker() -> StreamChecker {
        StreamChecker::new(TokenFunction::built_in(), PROMPT.to_vec(), 8)
    }

    fn message(event: Event) -> GenerateResponse {
        GenerateResponse { event: Some(event) }
    }

    fn accepted() -> GenerateResponse {
        message(Event::Accepted(Accepted::default()))
    }

    fn tokens(first: u32, count: u32) -> GenerateResponse {
        let function = TokenFunction::built_in();
        let ids = function.expected(&PROMPT, first + count)[first as usize..].to_vec();
        let text = ids
            .iter()
            .map(|id| function.vocabulary().text(*id))
            .collect();
        message(Event::Tokens(Tokens {
            first_index: first,
            ids,
            text,
            ..Default::default()
        }))
    }

    fn finished(count: u32) -> GenerateResponse {
        message(Event::Finished(Finished {
            reason: FinishReason::Length as i32,
            usage: Some(Usage {
                output_tokens: count,
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    fn run(messages: Vec<GenerateResponse>) -> Result<Checked, Violation> {
        let mut checker = checker();
        for message in messages {
            checker.observe(message)?;
        }
        checker.end(None)
    }

    #[test]
    fn a_right_stream_passes() {
        let checked = run(vec![accepted(), tokens(0, 1), tokens(1, 3), finished(4)]).unwrap();
        assert_eq!((checked.tokens, checked.messages), (4, 2));
        assert_eq!(checked.finished, Some(FinishReason::Length));
    }

    #[test]
    fn each_broken_promise_is_found() {
        let gap = |expected, got| Violation::Index { expected, got };
        let cases = [
            (vec![tokens(0, 1)], Violation::NotAcceptedFirst),
            (vec![accepted(), accepted()], Violation::AcceptedTwice),
            (vec![accepted(), tokens(1, 1)], gap(0, 1)),
            (vec![accepted(), tokens(0, 2), tokens(1, 1)], gap(2, 1)),
            (vec![accepted(), tokens(0, 9)], Violation::TooMany(9)),
            (vec![accepted(), tokens(0, 1)], Violation::NoEnd),
            (
                vec![accepted(), finished(0), tokens(0, 1)],
                Violation::AfterFinished,
            ),
            (
                vec![accepted(), tokens(0, 2), finished(3)],
                Violation::Usage {
                    expected: 2,
                    got: 3,
                },
            ),
        ];
        for (messages, violation) in cases {
            assert_eq!(run(messages), Err(violation));
        }
    }

    #[test]
    fn a_wrong_token_and_a_wrong_text_are_found() {
        let mut wrong = tokens(0, 2);
        let Some(Event::Tokens(inner)) = &mut wrong.event else {
            unreachable!()
        };
        inner.ids[1] ^= 1;
        assert!(matches!(
            run(vec![accepted(), wrong]),
            Err(Violation::Token { index: 1, .. })
        ));
        let mut wrong = tokens(0, 2);
        let Some(Event::Tokens(inner)) = &mut wrong.event else {
            unreachable!()
        };
        inner.text.push('!');
        assert!(matches!(
            run(vec![accepted(), wrong, finished(2)]),
            Err(Violation::Text { .. })
        ));
    }

    #[test]
    fn a_status_ends_a_stream_as_well_as_finished_does() {
        let mut checker = checker();
        checker.observe(accepted()).unwrap();
        checker.observe(tokens(0, 3)).unwrap();
        let checked = checker.end(Some(&Status::unavailable("lost"))).unwrap();
        assert_eq!((checked.tokens, checked.code), (3, Code::Unavailable));
    }
}
