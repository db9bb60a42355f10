//! Calls in content: where they begin, what is behind them, and what of it is content
//! after all.

use std::sync::Arc;

use crate::{
    Calls, ToolFormat,
    arguments::Arguments,
    deepseek,
    event::Events,
    hermes, llama,
    look::{Look, More, consume, first, is_space, partial, space_before},
    mistral,
    object::{CallObject, Progress, Rules},
    pythonic::{self, PythonArguments},
    tool::Tool,
    xml::{self, Parameters, Step},
};

/// What is behind the mark of a call.
pub(crate) enum Opening {
    /// No call.
    None,
    /// An object that may be one, so many bytes behind the mark.
    Object(usize),
    /// A list of such objects; where the first is.
    List(usize),
    /// Arguments of this tool.
    Arguments(usize, String),
    /// Parameters with tags of their own.
    Parameters(usize, Parameters),
    /// Arguments of this tool in Python, behind their bracket.
    Python(usize, String),
}

/// What is behind a call.
pub(crate) enum After {
    /// Its last part ends so many bytes on; other text follows.
    Content(usize),
    /// An object that may be one more, so many bytes on.
    Object(usize),
    /// Arguments of one more in Python.
    Python(usize, String),
}

/// How a model writes calls.
#[derive(Clone, Debug)]
pub(crate) struct Dialect {
    kind: Kind,
    /// The tools that there are.
    tools: Arc<[Tool]>,
    /// The tool of a forced call.
    forced: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hermes,
    Llama,
    Mistral,
    DeepSeek,
    Qwen,
    Glm,
    Pythonic,
    List,
    One,
}

impl Dialect {
    /// `None`: nothing in content is a call.
    pub(crate) fn of(calls: &Calls) -> Option<Self> {
        let (mut tools, mut forced) = (Arc::default(), None);
        let kind = match calls {
            Calls::None => return None,
            Calls::List => Kind::List,
            Calls::One(name) => {
                forced = Some(name.clone());
                Kind::One
            }
            Calls::Native { format, tools: all } => {
                tools = Arc::clone(all);
                match format {
                    ToolFormat::Hermes => Kind::Hermes,
                    ToolFormat::Llama3 => Kind::Llama,
                    ToolFormat::Mistral => Kind::Mistral,
                    ToolFormat::DeepSeek => Kind::DeepSeek,
                    ToolFormat::Qwen3Coder => Kind::Qwen,
                    ToolFormat::Glm45 => Kind::Glm,
                    ToolFormat::Pythonic => Kind::Pythonic,
                    ToolFormat::Harmony => return None,
                }
            }
        };
        Some(Self {
            kind,
            tools,
            forced,
        })
    }

    /// Marks that a call begins with.
    fn marks(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Hermes => &[hermes::OPEN],
            Kind::Llama => &[llama::OPEN],
            Kind::Mistral => &[mistral::OPEN],
            Kind::DeepSeek => deepseek::OPENING,
            Kind::Qwen => xml::QWEN_OPENING,
            Kind::Glm => xml::GLM_OPENING,
            Kind::Pythonic => pythonic::OPENING,
            Kind::List | Kind::One => &[],
        }
    }

    /// Marks behind arguments that stand by themselves.
    fn closing(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Mistral => mistral::CLOSING,
            Kind::DeepSeek => deepseek::CLOSING,
            Kind::Qwen => xml::QWEN_CLOSING,
            _ => &[],
        }
    }

    fn rules(&self) -> Rules<'_> {
        let llama = self.kind == Kind::Llama;
        Rules {
            tools: llama.then_some(&self.tools),
            bare: !llama,
            closing: match self.kind {
                Kind::Hermes => hermes::CLOSE,
                _ => "",
            },
        }
    }

    /// Behind one of its marks.
    fn open(&self, look: Look<'_>, mark: &str) -> Result<Opening, More> {
        match self.kind {
            Kind::Hermes => hermes::open(look),
            Kind::Llama => llama::open(look),
            Kind::Mistral => mistral::open(look),
            Kind::DeepSeek => deepseek::open(look),
            Kind::Qwen => xml::open_qwen(look, mark, &self.tools),
            Kind::Glm => xml::open_glm(look, &self.tools),
            Kind::Pythonic => pythonic::open(look, &self.tools),
            Kind::List | Kind::One => Ok(Opening::None),
        }
    }

    fn after(&self, look: Look<'_>, list: bool) -> Result<After, More> {
        match self.kind {
            Kind::Hermes => hermes::after(look, list),
            _ if list => mistral::after(look),
            Kind::Llama => llama::after(look),
            Kind::DeepSeek => deepseek::after(look),
            Kind::Qwen | Kind::Glm => xml::after(look),
            Kind::Pythonic => pythonic::after(look, &self.tools),
            Kind::Mistral | Kind::List | Kind::One => Ok(After::Content(0)),
        }
    }

    /// What an output begins with where no mark is needed.
    fn begin(&self, mut look: Look<'_>) -> Result<Opening, More> {
        match self.kind {
            Kind::Llama => llama::open(look),
            Kind::Pythonic => pythonic::open(look, &self.tools),
            Kind::List => {
                look.space();
                let list = look.literal("[")?;
                look.space();
                Ok(match look.peek()? {
                    Some(b'{') if list => Opening::List(look.at),
                    Some(b'{') => Opening::Object(look.at),
                    _ => Opening::None,
                })
            }
            Kind::One => {
                look.space();
                Ok(match (look.peek()?, &self.forced) {
                    (Some(_), Some(name)) => Opening::Arguments(look.at, name.clone()),
                    _ => Opening::None,
                })
            }
            Kind::Hermes | Kind::Mistral | Kind::DeepSeek | Kind::Qwen | Kind::Glm => {
                Ok(Opening::None)
            }
        }
    }
}

/// ```text
/// Begin ──▶ Content ─mark─▶ Open ─▶ Object | Arguments ─▶ After ─▶ Gap ─▶ Content
///                ▲───none────┴─────────┘        ▲──────────┘
/// ```
#[derive(Debug)]
enum State {
    /// Nothing was told.
    Begin,
    Content,
    /// So many bytes of white space before this mark, and what is behind it.
    Open(usize, &'static str),
    /// Behind so many bytes an object that may be a call, of a list or alone.
    Object {
        before: usize,
        call: CallObject,
        list: bool,
    },
    Arguments(Arguments),
    Parameters(Parameters),
    Python(PythonArguments),
    /// A call has ended.
    After {
        list: bool,
    },
    /// White space between calls and content.
    Gap,
}

/// Finds calls in content.
#[derive(Debug)]
pub(crate) struct CallParser {
    dialect: Dialect,
    state: State,
    /// Content that is not told.
    held: String,
}

impl CallParser {
    pub(crate) fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            state: State::Begin,
            held: String::new(),
        }
    }

    pub(crate) fn push(&mut self, text: &str, out: &mut Events) {
        self.held.push_str(text);
        self.read(false, out);
    }

    pub(crate) fn finish(&mut self, out: &mut Events) {
        self.read(true, out);
    }

    fn read(&mut self, ended: bool, out: &mut Events) {
        let mut held = std::mem::take(&mut self.held);
        consume(&mut held, |text| self.step(text, ended, out));
        self.held = held;
    }

    /// Takes some bytes, or goes on to another state; `None`: more have to come.
    fn step(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        match &mut self.state {
            State::Begin => {
                let opening = self.dialect.begin(Look::new(text, ended)).ok()?;
                Some(self.opened(opening, text, 0, out))
            }
            State::Content => self.content(text, ended, out),
            State::Open(space, mark) => {
                let behind = *space + mark.len();
                let look = Look::new(&text[behind..], ended);
                let opening = self.dialect.open(look, mark).ok()?;
                Some(self.opened(opening, text, behind, out))
            }
            State::Object { .. } => self.object(text, ended, out),
            State::Arguments(arguments) => match arguments.read(text, ended, out) {
                Progress::Call(end) => {
                    self.state = State::After { list: false };
                    Some(end)
                }
                Progress::More | Progress::None => Some(arguments.cut()).filter(|cut| *cut > 0),
            },
            State::Parameters(parameters) => {
                let step = parameters.step(text, ended, out);
                self.stepped(step)
            }
            State::Python(arguments) => {
                let step = arguments.step(text, ended, out);
                self.stepped(step)
            }
            State::After { list } => {
                let list = *list;
                match self.dialect.after(Look::new(text, ended), list).ok()? {
                    After::Content(end) => {
                        self.state = State::Gap;
                        Some(end)
                    }
                    After::Object(before) => {
                        self.state = object(before, list);
                        Some(0)
                    }
                    After::Python(at, name) => {
                        Some(self.opened(Opening::Python(at, name), text, 0, out))
                    }
                }
            }
            State::Gap => {
                let space = text.bytes().take_while(|byte| is_space(*byte)).count();
                if space < text.len() {
                    self.state = State::Content;
                    return Some(space);
                }
                (space > 0).then_some(space)
            }
        }
    }

    fn stepped(&mut self, step: Step) -> Option<usize> {
        match step {
            Step::More => None,
            Step::Took(took) => Some(took),
            Step::Ended(took) => {
                self.state = State::After { list: false };
                Some(took)
            }
        }
    }

    /// Goes on behind `mark` bytes of white space and a mark.
    fn opened(&mut self, opening: Opening, text: &str, mark: usize, out: &mut Events) -> usize {
        match opening {
            Opening::None => {
                out.content(&text[..mark]);
                self.state = State::Content;
                mark
            }
            Opening::Object(at) => {
                self.state = object(mark + at, false);
                0
            }
            Opening::List(at) => {
                self.state = object(mark + at, true);
                0
            }
            Opening::Arguments(at, name) => {
                out.call(name);
                self.state = State::Arguments(Arguments::new(self.dialect.closing()));
                mark + at
            }
            Opening::Parameters(at, parameters) => {
                out.call(parameters.name().to_owned());
                self.state = State::Parameters(parameters);
                mark + at
            }
            Opening::Python(at, name) => {
                out.call(name);
                self.state = State::Python(PythonArguments::default());
                mark + at
            }
        }
    }

    fn content(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        let marks = self.dialect.marks();
        if let Some((at, mark)) = first(text, marks) {
            let told = space_before(text, at);
            out.content(&text[..told]);
            self.state = State::Open(at - told, mark);
            return Some(told);
        }
        let told = match ended || marks.is_empty() {
            true => text.len(),
            false => space_before(text, partial(text, marks)),
        };
        out.content(&text[..told]);
        (told > 0).then_some(told)
    }

    fn object(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        let State::Object { before, call, list } = &mut self.state else {
            return None;
        };
        let rules = self.dialect.rules();
        match call.read(&text[*before..], ended, &rules, out) {
            Progress::Call(end) => {
                let took = *before + end;
                self.state = State::After { list: *list };
                Some(took)
            }
            Progress::More => {
                let cut = call.cut();
                if !call.is_call() {
                    return None;
                }
                let took = std::mem::take(before) + cut;
                (took > 0).then_some(took)
            }
            Progress::None => {
                let before = *before;
                out.content(&text[..before]);
                self.state = State::Content;
                Some(before)
            }
        }
    }
}

fn object(before: usize, list: bool) -> State {
    State::Object {
        before,
        call: CallObject::new(),
        list,
    }
}
