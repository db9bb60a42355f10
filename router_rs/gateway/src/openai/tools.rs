//! Tools that a model is offered, and which of them it may or has to call.

use kvmesh_output_parser::Calls;
use kvmesh_wire::v1::{self, grammar::Kind};
use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, MapAccess, Visitor},
};
use serde_json::{Value, json, value::RawValue};

use super::{error::CANNOT_CONSTRAIN, fields::Fields, message::is_object, schema};
use crate::{error::RequestError, mesh::ServedModel};

/// Longest name of a tool, bytes.
const MAX_NAME: usize = 256;

/// What a call says of tools, where it offers any.
#[derive(Debug)]
pub(super) struct Tools {
    tools: Vec<Tool>,
    choice: Choice,
    /// More than one call is told of.
    pub(super) parallel: bool,
}

#[derive(Debug)]
struct Tool {
    name: String,
    /// As the client wrote it, in JSON.
    whole: String,
}

/// A tool's JSON, of which nothing is made yet.
#[derive(Default, Deserialize)]
struct Given<'a> {
    #[serde(borrow)]
    r#type: Option<&'a RawValue>,
    #[serde(borrow)]
    function: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct Function<'a> {
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    /// JSON Schema of its arguments.
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
}

impl<'a> Function<'a> {
    /// Of a tool. What is no JSON object has nothing.
    fn of(tool: &'a str) -> Result<Self, serde_json::Error> {
        let given: Given<'a> = serde_json::from_str(tool)?;
        match given.function {
            Some(function) if is_object(function) => serde_json::from_str(function.get()),
            _ => Ok(Self::default()),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// The model decides.
    Auto,
    /// One or more.
    Required,
    /// This one.
    Named(String),
}

fn unsupported<T>(field: &str, words: &str) -> Result<T, RequestError> {
    Err(RequestError::Unsupported {
        field: field.to_owned(),
        words: words.to_owned(),
    })
}

impl Tools {
    /// What a body says of them. `None`: nothing is offered, or nothing may be called.
    pub(super) fn take(fields: &mut Fields) -> Result<Option<Self>, RequestError> {
        let choice = fields.tool_choice.take();
        let choice = choice.as_deref().map(choice_of).transpose()?;
        let offered = fields.tools.take().map_or_else(Vec::new, |tools| tools.0);
        if matches!(choice, Some(None)) {
            return Ok(None);
        }
        let choice = choice.flatten().unwrap_or(Choice::Auto);
        if offered.is_empty() {
            return match choice {
                Choice::Auto => Ok(None),
                _ => Err(RequestError::invalid("tool_choice", "needs tools")),
            };
        }
        let tools = offered.into_iter().enumerate();
        let tools: Vec<Tool> = tools.map(tool).collect::<Result<_, _>>()?;
        if let Choice::Named(name) = &choice
            && !tools.iter().any(|tool| tool.name == *name)
        {
            let known: Vec<&str> = tools.iter().map(|tool| tool.name.as_str()).collect();
            let allowed = format!("a function of tools: {}", known.join(", "));
            return Err(RequestError::invalid("tool_choice", allowed));
        }
        let format = fields.response_format.as_ref();
        if format.is_some_and(|format| format.r#type != "text") {
            // It holds from the first token: with it a model can never call anything.
            let words =
                "a call has its own format: leave one of the two out, or set tool_choice to none";
            return unsupported("response_format", words);
        }
        Ok(Some(Self {
            tools,
            choice,
            parallel: fields.parallel_tool_calls.unwrap_or(true),
        }))
    }

    /// As the template is told of them.
    pub(super) fn offered(&self) -> Vec<String> {
        self.tools.iter().map(|tool| tool.whole.clone()).collect()
    }

    /// What holds the output to a call, where one is forced.
    pub(super) fn grammar(&self) -> Result<Option<v1::Grammar>, RequestError> {
        let schema = match &self.choice {
            Choice::Auto => return Ok(None),
            Choice::Named(name) => {
                let mut tools = self.tools.iter().enumerate();
                let named = tools.find(|(_, tool)| tool.name == *name);
                let parameters = named.map(parameters).transpose()?;
                schema::arguments(&parameters.unwrap_or_else(|| json!({})))
            }
            Choice::Required => {
                let tools = self.tools.iter().enumerate();
                let parameters: Vec<Value> = tools.map(parameters).collect::<Result<_, _>>()?;
                let tools = self.tools.iter().zip(&parameters);
                let tools: Vec<(&str, &Value)> = tools
                    .map(|(tool, parameters)| (tool.name.as_str(), parameters))
                    .collect();
                schema::any_call(&tools, self.parallel)?
            }
        };
        Ok(Some(v1::Grammar {
            kind: Some(Kind::JsonSchema(schema.to_string())),
            ..v1::Grammar::default()
        }))
    }

    /// How calls will be written, by what the model and its engine can do.
    pub(super) fn calls(
        &self,
        model: &ServedModel,
        format: Option<kvmesh_output_parser::ToolFormat>,
    ) -> Result<Calls, RequestError> {
        if self.choice != Choice::Auto && !model.capabilities.grammars {
            let words = format!("only auto and none: {CANNOT_CONSTRAIN}");
            return unsupported("tool_choice", &words);
        }
        Ok(match &self.choice {
            Choice::Required => Calls::List,
            Choice::Named(name) => Calls::One(name.clone()),
            Choice::Auto => {
                let Some(format) = format else {
                    let words = "how this model writes calls is not known; \
                        the router's setting tool_parser says it";
                    return unsupported("tools", words);
                };
                let tools = self.tools.iter().enumerate();
                // Of each schema little is kept, and one is there at a time.
                let known = |(at, tool): (usize, &Tool)| {
                    let parameters = parameters((at, tool))?;
                    let name = tool.name.clone();
                    Ok(kvmesh_output_parser::Tool::new(name, &parameters))
                };
                Calls::Native {
                    format,
                    tools: tools.map(known).collect::<Result<_, RequestError>>()?,
                }
            }
        })
    }
}

fn tool((at, given): (usize, Box<RawValue>)) -> Result<Tool, RequestError> {
    let field = |name: &str| format!("tools[{at}]{name}");
    let twice = |_| RequestError::invalid(field(""), "a JSON object with each of its names once");
    let whole = String::from(Box::<str>::from(given));
    let object = whole.starts_with('{');
    let given: Given<'_> = match object {
        true => serde_json::from_str(&whole).map_err(twice)?,
        false => Given::default(),
    };
    let kind = given
        .r#type
        .map(|kind| serde_json::from_str::<String>(kind.get()));
    let typed = match kind {
        Some(Ok(kind)) if kind == "function" => true,
        Some(Ok(_)) => return unsupported(&field(".type"), "only \"function\""),
        Some(Err(_)) => return Err(RequestError::invalid(field(".type"), "\"function\"")),
        None => false,
    };
    let function = match object {
        true => Function::of(&whole).map_err(twice)?,
        false => Function::default(),
    };
    let name = function
        .name
        .map(|name| serde_json::from_str::<String>(name.get()));
    let name = name.and_then(Result::ok).unwrap_or_default();
    if !(1..=MAX_NAME).contains(&name.len()) {
        let allowed = format!("a text of 1 to {MAX_NAME} bytes");
        return Err(RequestError::invalid(field(".function.name"), allowed));
    }
    if function.parameters.is_some_and(|schema| !is_object(schema)) {
        let field = field(".function.parameters");
        return Err(RequestError::invalid(field, "a JSON Schema"));
    }
    let whole = match typed {
        true => whole,
        false => as_function(&whole).map_err(twice)?,
    };
    Ok(Tool { name, whole })
}

/// The JSON Schema of a tool's arguments.
fn parameters((at, tool): (usize, &Tool)) -> Result<Value, RequestError> {
    let invalid = |error: serde_json::Error| {
        RequestError::invalid(
            format!("tools[{at}].function.parameters"),
            error.to_string(),
        )
    };
    match Function::of(&tool.whole).map_err(invalid)?.parameters {
        None => Ok(json!({"type": "object", "properties": {}})),
        Some(schema) => serde_json::from_str(schema.get()).map_err(invalid),
    }
}

/// A tool that names no type is a function. Templates are told so.
fn as_function(tool: &str) -> Result<String, serde_json::Error> {
    let mut whole = String::with_capacity(tool.len() + 24);
    whole.push_str("{\"type\":\"function\"");
    let mut json = serde_json::Deserializer::from_str(tool);
    Untyped(&mut whole).deserialize(&mut json)?;
    whole.push('}');
    Ok(whole)
}

/// Writes the members of an object, without its type.
struct Untyped<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Untyped<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Untyped<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
            if name != "type" {
                let name = Value::String(name);
                self.0.push_str(&format!(",{name}:{value}"));
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Named {
    r#type: Option<String>,
    function: Option<NamedFunction>,
}

#[derive(Deserialize)]
struct NamedFunction {
    name: Option<String>,
}

/// `Some`: one may be called.
fn choice_of(given: &RawValue) -> Result<Option<Choice>, RequestError> {
    let invalid = || {
        let allowed = "none, auto, required, or a function: \
            {\"type\": \"function\", \"function\": {\"name\": …}}";
        Err(RequestError::invalid("tool_choice", allowed))
    };
    if let Ok(word) = serde_json::from_str::<String>(given.get()) {
        return match word.as_str() {
            "none" => Ok(None),
            "auto" => Ok(Some(Choice::Auto)),
            "required" => Ok(Some(Choice::Required)),
            _ => invalid(),
        };
    }
    if !is_object(given) {
        return invalid();
    }
    let Ok(Named { r#type, function }) = serde_json::from_str(given.get()) else {
        return invalid();
    };
    match (r#type.as_deref(), function.and_then(|named| named.name)) {
        (Some("function"), Some(name)) => Ok(Some(Choice::Named(name))),
        (Some("allowed_tools" | "custom"), _) => unsupported(
            "tool_choice",
            "only functions; offer those that are allowed",
        ),
        _ => invalid(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tools(body: &Value) -> Result<Option<Tools>, RequestError> {
        Tools::take(&mut Fields::read(body.to_string().as_bytes()).unwrap())
    }

    fn function(name: &str, parameters: &Value) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    }

    fn schema(body: &Value) -> Result<Value, RequestError> {
        let grammar = tools(body)?.unwrap().grammar()?;
        match grammar.unwrap().kind.unwrap() {
            Kind::JsonSchema(text) => Ok(serde_json::from_str(&text).unwrap()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_forced_call_becomes_a_grammar() {
        let own = json!({"type": "object", "$defs": {"City": {"type": "string"}},
            "properties": {"city": {"$ref": "#/$defs/City"}}});
        let offered = json!([function("f", &own), {"type": "function", "function": {"name": "g"}}]);
        let named = json!({"type": "function", "function": {"name": "f"}});
        let one = schema(&json!({"tools": offered, "tool_choice": named})).unwrap();
        assert_eq!(one, own);
        let body =
            json!({"tools": offered, "tool_choice": "required", "parallel_tool_calls": false});
        let any = schema(&body).unwrap();
        assert_eq!(any["$defs"], own["$defs"]);
        assert_eq!((&any["minItems"], &any["maxItems"]), (&json!(1), &json!(1)));
        let calls = any["items"]["anyOf"].as_array().unwrap();
        assert_eq!(
            calls[0]["properties"]["name"],
            json!({"type": "string", "enum": ["f"]})
        );
        assert_eq!(
            calls[0]["properties"]["parameters"]["properties"],
            own["properties"]
        );
        assert!(calls[0]["properties"]["parameters"].get("$defs").is_none());
        let parameters = &calls[1]["properties"]["parameters"];
        assert_eq!(*parameters, json!({"type": "object", "properties": {}}));
        let other = json!({"$defs": {"City": {"type": "number"}}});
        let offered = json!([function("f", &own), function("g", &other)]);
        let refused = schema(&json!({"tools": offered, "tool_choice": "required"})).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("tools[1].function.parameters.$defs.City")
        );
    }

    #[test]
    fn what_is_not_to_be_called_is_not_offered() {
        let offered = json!([function("f", &json!({}))]);
        for body in [
            json!({}),
            json!({"tools": []}),
            json!({"tool_choice": "auto"}),
            json!({"tool_choice": "none"}),
            json!({"tools": offered, "tool_choice": "none"}),
        ] {
            assert!(tools(&body).unwrap().is_none(), "{body}");
        }
        let auto = tools(&json!({"tools": offered})).unwrap().unwrap();
        assert!(auto.parallel && auto.grammar().unwrap().is_none());
        assert_eq!(auto.offered(), [offered[0].to_string()]);
    }

    #[test]
    fn a_tool_without_a_type_is_a_function() {
        let whole = function("f", &json!({"type": "object"}));
        let bare = json!({"function": whole["function"]});
        let null = json!({"function": whole["function"], "type": null});
        for tool in [bare, null] {
            let read = tools(&json!({"tools": [tool]})).unwrap().unwrap();
            assert_eq!(read.offered(), [whole.to_string()]);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let offered = json!([function("f", &json!({}))]);
        let other = json!({"type": "function", "function": {"name": "g"}});
        for (body, field) in [
            (json!({"tool_choice": "required"}), "tool_choice"),
            (
                json!({"tools": offered, "tool_choice": "must"}),
                "tool_choice",
            ),
            (
                json!({"tools": offered, "tool_choice": other}),
                "tool_choice",
            ),
            (
                json!({"tools": offered, "tool_choice": {"type": "allowed_tools"}}),
                "tool_choice",
            ),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [{"type": 7}]}), "tools[0].type"),
            (json!({"tools": [{}]}), "tools[0].function.name"),
            (json!({"tools": [7]}), "tools[0].function.name"),
            (
                json!({"tools": [offered[0], function("", &json!({}))]}),
                "tools[1].function.name",
            ),
            (
                json!({"tools": [function("f", &json!(7))]}),
                "tools[0].function.parameters",
            ),
            (
                json!({"tools": offered, "tool_choice": "required",
                    "response_format": {"type": "json_object"}}),
                "response_format",
            ),
            (
                json!({"tools": offered, "response_format": {"type": "json_object"}}),
                "response_format",
            ),
        ] {
            let error = tools(&body).unwrap_err();
            let named = match &error {
                RequestError::Invalid(all) => &all.0[0].field,
                RequestError::Unsupported { field, .. } => field,
                other => panic!("{body}: {other}"),
            };
            assert_eq!(named, field, "{body}");
        }
    }
}
