//! JSON Schemas of what a grammar holds forced calls to.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::error::RequestError;

/// Where the schemas of tools keep parts that they refer to.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];
/// What says more of a schema than that it is an object.
const TELLING: [&str; 7] = ["type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"];
/// Keywords whose members have names of their own.
const NAMED: [&str; 5] = [
    "properties",
    "patternProperties",
    "dependentSchemas",
    "$defs",
    "definitions",
];
/// Keywords that hold values, which refer to nothing.
const VALUES: [&str; 4] = ["const", "enum", "default", "examples"];

/// What the arguments of a call are held to: an object, also where the tool does not say so.
pub(super) fn arguments(parameters: &Value) -> Value {
    let mut schema = parameters.clone();
    if let Value::Object(object) = &mut schema
        && !TELLING.iter().any(|key| object.contains_key(*key))
    {
        object.insert("type".to_owned(), json!("object"));
    }
    schema
}

/// The schema of a list of calls of these tools, each with its name and the schema of its
/// arguments.
///
/// # Errors
/// Where two tools have other definitions of one name.
pub(super) fn any_call(tools: &[(&str, &Value)], parallel: bool) -> Result<Value, RequestError> {
    let mut shared: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    let mut calls = Vec::with_capacity(tools.len());
    for (at, (name, parameters)) in tools.iter().enumerate() {
        let mut parameters = arguments(parameters);
        let whole = free_name(at, tools);
        let place = format!("#/{}/{whole}", DEFINITIONS[0]);
        // References count from the root of a schema: what they name moves there.
        let within = moved(&mut parameters, &place);
        for place in DEFINITIONS {
            let own = parameters
                .as_object_mut()
                .and_then(|all| all.shift_remove(place));
            let Some(Value::Object(own)) = own else {
                continue;
            };
            let all = shared.entry(place).or_default();
            for (name, schema) in own {
                if all.get(&name).is_some_and(|other| *other != schema) {
                    let field = format!("tools[{at}].function.parameters.{place}.{name}");
                    let allowed = "with tool_choice required, the same in all tools";
                    return Err(RequestError::invalid(field, allowed));
                }
                all.insert(name, schema);
            }
        }
        if within {
            let all = shared.entry(DEFINITIONS[0]).or_default();
            all.insert(whole, parameters);
            parameters = json!({"$ref": place});
        }
        calls.push(json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [name]},
                "parameters": parameters,
            },
            "required": ["name", "parameters"],
            "additionalProperties": false,
        }));
    }
    let mut schema = json!({"type": "array", "minItems": 1, "items": {"anyOf": calls}});
    if !parallel {
        schema["maxItems"] = json!(1);
    }
    for (place, all) in shared {
        schema[place] = Value::Object(all);
    }
    Ok(schema)
}

/// A name for a whole schema among the definitions, which none of them has.
fn free_name(at: usize, tools: &[(&str, &Value)]) -> String {
    let mut name = format!("arguments_{at}");
    let taken = |name: &str| {
        let mut all = tools.iter().map(|(_, schema)| &schema[DEFINITIONS[0]]);
        all.any(|definitions| definitions.get(name).is_some())
    };
    while taken(&name) {
        name.push('_');
    }
    name
}

/// Has references within a schema count from `place`, where the schema is going to be. True:
/// there are some, besides those to definitions, which stay where they are.
fn moved(schema: &mut Value, place: &str) -> bool {
    match schema {
        Value::Array(all) => all_moved(all.iter_mut(), place),
        Value::Object(object) => {
            let mut any = false;
            for (key, value) in object {
                any |= match value {
                    Value::String(to) if key == "$ref" => points(to, place),
                    Value::Object(all) if NAMED.contains(&key.as_str()) => {
                        all_moved(all.values_mut(), place)
                    }
                    _ if VALUES.contains(&key.as_str()) => false,
                    value => moved(value, place),
                };
            }
            any
        }
        _ => false,
    }
}

fn all_moved<'a>(all: impl Iterator<Item = &'a mut Value>, place: &str) -> bool {
    let mut any = false;
    for schema in all {
        any |= moved(schema, place);
    }
    any
}

fn points(to: &mut String, place: &str) -> bool {
    // Anchors, and other documents, are not ours to move.
    let Some(path) = to.strip_prefix('#') else {
        return false;
    };
    let definition = path.strip_prefix('/').is_some_and(|path| {
        let mut places = DEFINITIONS.iter();
        places.any(|place| path.split('/').next() == Some(*place))
    });
    if definition || !(path.is_empty() || path.starts_with('/')) {
        return false;
    }
    *to = format!("{place}{path}");
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// All references of a schema.
    fn references(schema: &Value, into: &mut Vec<String>) {
        match schema {
            Value::Array(all) => all.iter().for_each(|schema| references(schema, into)),
            Value::Object(object) => {
                for (key, value) in object {
                    match value {
                        Value::String(to) if key == "$ref" => into.push(to.clone()),
                        value => references(value, into),
                    }
                }
            }
            _ => {}
        }
    }

    #[test]
    fn references_within_a_schema_lead_where_it_went() {
        let tree = json!({
            "type": "object",
            "$defs": {"Leaf": {"type": "string"}, "Twig": {"$ref": "#/properties/size"},
                "arguments_0": {"type": "null"}},
            "properties": {
                "size": {"type": "integer"},
                "other": {"$ref": "#/properties/size"},
                "child": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/Leaf"}]},
                "$ref": {"$ref": "#/$defs/Twig"},
                "default": {"$ref": "#/$defs/arguments_0"},
                "word": {"enum": [{"$ref": "#"}], "default": "#"},
            },
        });
        let plain = json!({"type": "object", "properties": {"leaf": {"$ref": "#/$defs/Leaf"}},
            "$defs": {"Leaf": {"type": "string"}}});
        let schema = any_call(&[("f", &tree), ("g", &plain)], true).unwrap();
        let calls = schema["items"]["anyOf"].as_array().unwrap();
        let place = "#/$defs/arguments_0_";
        assert_eq!(calls[0]["properties"]["parameters"], json!({"$ref": place}));
        let moved = schema.pointer(&place[1..]).unwrap();
        assert_eq!(
            moved["properties"]["other"],
            json!({"$ref": format!("{place}/properties/size")})
        );
        assert_eq!(
            moved["properties"]["child"]["anyOf"][0],
            json!({"$ref": place})
        );
        // Values refer to nothing, and what refers to definitions alone stays as it is.
        assert_eq!(moved["properties"]["word"], tree["properties"]["word"]);
        assert_eq!(
            calls[1]["properties"]["parameters"]["properties"],
            plain["properties"]
        );
        let mut all = Vec::new();
        references(&schema, &mut all);
        all.retain(|to| to != "#");
        assert!(all.len() >= 8, "{all:?}");
        for to in all {
            assert!(schema.pointer(&to[1..]).is_some(), "{to} leads nowhere");
        }
    }

    #[test]
    fn arguments_are_an_object_where_nothing_else_is_said() {
        let object = json!({"type": "object"});
        assert_eq!(arguments(&json!({})), object);
        let named = json!({"properties": {"a": {}}});
        let held = json!({"properties": {"a": {}}, "type": "object"});
        assert_eq!(arguments(&named), held);
        for told in [
            json!({"$ref": "#/$defs/A"}),
            json!({"type": ["object", "null"]}),
        ] {
            assert_eq!(arguments(&told), told);
        }
        let schema = any_call(&[("f", &json!({}))], true).unwrap();
        let call = &schema["items"]["anyOf"][0]["properties"];
        assert_eq!(call["parameters"], object);
    }
}
