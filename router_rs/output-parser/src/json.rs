//! Where the parts of a JSON object are, byte by byte, with no more rules than are
//! needed to see their ends.

/// How far into an object the bytes have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Begin,
    /// Behind `{` or a comma.
    Member,
    Key,
    Colon,
    ValueBegin,
    Value(Nested),
    /// Behind a value.
    Next,
}

/// A value, or what looks like one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Nested {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

/// What a byte does to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Within {
    /// It is part of it.
    More,
    /// It is its last one.
    Last,
}

impl Nested {
    /// Takes a byte. Brackets are counted and not matched: what a model forgot is not
    /// ours to mend.
    pub(crate) fn take(&mut self, byte: u8) -> Within {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => {
                    self.in_string = false;
                    if self.depth == 0 {
                        return Within::Last;
                    }
                }
                _ => {}
            }
            return Within::More;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth = self.depth.saturating_add(1),
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 0 {
                    return Within::Last;
                }
            }
            _ => {}
        }
        Within::More
    }

    /// Whether marks of a format mean something here.
    pub(crate) fn in_string(&self) -> bool {
        self.in_string
    }
}

/// What a byte is to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Nothing new.
    More,
    /// It is the quote before a key.
    KeyBegins,
    /// It is the quote behind a key.
    KeyEnds,
    /// It is the first of a value.
    ValueBegins,
    /// It is the last of a value.
    ValueEnds,
    /// It is the first behind a value without brackets or quotes, and is to be taken
    /// once more.
    ValueEnded,
    /// It closes the object.
    Ends,
    /// It has no place here.
    Wrong,
}

/// Reads one object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ObjectScan {
    state: State,
    escaped: bool,
    /// The value has neither brackets nor quotes.
    bare: bool,
}

impl ObjectScan {
    pub(crate) fn new() -> Self {
        Self {
            state: State::Begin,
            escaped: false,
            bare: false,
        }
    }

    /// Whether marks of a format mean something here.
    pub(crate) fn in_string(&self) -> bool {
        match self.state {
            State::Key => true,
            State::Value(nested) => nested.in_string(),
            _ => false,
        }
    }

    pub(crate) fn take(&mut self, byte: u8) -> Seen {
        let space = super::look::is_space(byte);
        match (self.state, byte) {
            (State::Begin, b'{') => self.to(State::Member, Seen::More),
            (State::Member, b'"') => self.to(State::Key, Seen::KeyBegins),
            (State::Member | State::Next, b'}') => Seen::Ends,
            (State::Key, _) if self.escaped => {
                self.escaped = false;
                Seen::More
            }
            (State::Key, b'\\') => {
                self.escaped = true;
                Seen::More
            }
            (State::Key, b'"') => self.to(State::Colon, Seen::KeyEnds),
            (State::Key, _) => Seen::More,
            (State::Colon, b':') => self.to(State::ValueBegin, Seen::More),
            (State::ValueBegin, b',' | b'}' | b']' | b':') => Seen::Wrong,
            (State::ValueBegin, _) if !space => {
                let mut nested = Nested::default();
                nested.take(byte);
                self.bare = !matches!(byte, b'"' | b'{' | b'[');
                self.to(State::Value(nested), Seen::ValueBegins)
            }
            (State::Value(_), _) if self.bare => match space || matches!(byte, b',' | b'}') {
                true => self.to(State::Next, Seen::ValueEnded),
                false => Seen::More,
            },
            (State::Value(mut nested), _) => match nested.take(byte) {
                Within::Last => self.to(State::Next, Seen::ValueEnds),
                Within::More => self.to(State::Value(nested), Seen::More),
            },
            (State::Next, b',') => self.to(State::Member, Seen::More),
            _ if space => Seen::More,
            _ => Seen::Wrong,
        }
    }

    fn to(&mut self, state: State, seen: Seen) -> Seen {
        self.state = state;
        seen
    }
}
