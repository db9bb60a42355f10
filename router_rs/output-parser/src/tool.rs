//! What is known of the tools that a model is offered.

use std::{
    collections::BTreeMap,
    ops::{BitAnd, BitOr},
};

use serde_json::{Map, Value};

/// Schemas that are looked at for one tool: one that refers to itself has no end.
const MOST_SCHEMAS: u32 = 4_096;
/// Schemas within each other that are looked at.
const MOST_DEPTH: u32 = 16;

/// A tool that a model is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    name: String,
    parameters: BTreeMap<String, Types>,
}

impl Tool {
    /// With the JSON Schema of its arguments: formats that write values as text need it to
    /// tell a number from text.
    #[must_use]
    pub fn new(name: impl Into<String>, schema: &Value) -> Self {
        let mut reading = Reading {
            root: schema,
            left: MOST_SCHEMAS,
        };
        let mut parameters = BTreeMap::new();
        reading.parameters(schema, MOST_DEPTH, &mut parameters);
        Self {
            name: name.into(),
            parameters,
        }
    }

    /// One of which nothing but the name is known.
    pub(crate) fn unknown(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            parameters: BTreeMap::new(),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a parameter may be; anything where the schema does not say.
    pub(crate) fn types(&self, parameter: &str) -> Types {
        self.parameters
            .get(parameter)
            .copied()
            .unwrap_or(Types::ANY)
    }
}

/// A tool of this name.
pub(crate) fn named<'a>(tools: &'a [Tool], name: &str) -> Option<&'a Tool> {
    tools.iter().find(|tool| tool.name == name)
}

/// Types of JSON that a value may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Types(u8);

impl Types {
    const NONE: Self = Self(0);
    pub(crate) const STRING: Self = Self(1);
    pub(crate) const NUMBER: Self = Self(2);
    pub(crate) const BOOLEAN: Self = Self(4);
    pub(crate) const NULL: Self = Self(8);
    pub(crate) const OBJECT: Self = Self(16);
    pub(crate) const ARRAY: Self = Self(32);
    pub(crate) const ANY: Self = Self(63);

    /// Whether a value of this type is one of them.
    pub(crate) fn has(self, one: Self) -> bool {
        self & one != Self::NONE
    }

    /// The type of a value by its first byte; the value is known to be JSON.
    pub(crate) fn of_json(first: u8) -> Self {
        match first {
            b'"' => Self::STRING,
            b'{' => Self::OBJECT,
            b'[' => Self::ARRAY,
            b't' | b'f' => Self::BOOLEAN,
            b'n' => Self::NULL,
            _ => Self::NUMBER,
        }
    }

    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::NULL,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Number(_) => Self::NUMBER,
            Value::String(_) => Self::STRING,
            Value::Array(_) => Self::ARRAY,
            Value::Object(_) => Self::OBJECT,
        }
    }

    /// By its name in JSON Schema, or in Python: tools are often made from functions there.
    fn of_name(name: &str) -> Self {
        match name {
            "string" | "str" => Self::STRING,
            "integer" | "number" | "int" | "float" => Self::NUMBER,
            "boolean" | "bool" => Self::BOOLEAN,
            "null" => Self::NULL,
            "object" | "dict" => Self::OBJECT,
            "array" | "list" => Self::ARRAY,
            _ => Self::ANY,
        }
    }

    fn union(all: impl Iterator<Item = Self>) -> Self {
        all.fold(Self::NONE, BitOr::bitor)
    }
}

impl BitAnd for Types {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Types {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Reads a schema, up to some bound.
struct Reading<'a> {
    root: &'a Value,
    left: u32,
}

impl<'a> Reading<'a> {
    /// An object that is a schema, while the bounds allow it.
    fn object(&mut self, schema: &'a Value, depth: u32) -> Option<&'a Map<String, Value>> {
        let object = schema.as_object().filter(|_| depth > 0)?;
        self.left = self.left.checked_sub(1)?;
        Some(object)
    }

    /// What a schema refers to.
    fn referred(&self, object: &'a Map<String, Value>) -> Option<&'a Value> {
        let pointer = object.get("$ref")?.as_str()?.strip_prefix('#')?;
        self.root.pointer(pointer)
    }

    /// Adds the properties of a schema, and of those that it is made of.
    fn parameters(&mut self, schema: &'a Value, depth: u32, into: &mut BTreeMap<String, Types>) {
        let Some(object) = self.object(schema, depth) else {
            return;
        };
        let properties = object.get("properties").and_then(Value::as_object);
        for (name, schema) in properties.into_iter().flatten() {
            let types = self.types(schema, depth - 1);
            // Of several alternatives each may be the one.
            let known = into.get(name).copied().unwrap_or(Types::NONE);
            into.insert(name.clone(), known | types);
        }
        if let Some(schema) = self.referred(object) {
            self.parameters(schema, depth - 1, into);
        }
        for key in ["allOf", "anyOf", "oneOf"] {
            let parts = object.get(key).and_then(Value::as_array);
            for schema in parts.into_iter().flatten() {
                self.parameters(schema, depth - 1, into);
            }
        }
    }

    /// The types that a schema allows; all where it does not say.
    fn types(&mut self, schema: &'a Value, depth: u32) -> Types {
        let Some(object) = self.object(schema, depth) else {
            return Types::ANY;
        };
        let mut all = match object.get("type") {
            Some(Value::String(name)) => Types::of_name(name),
            Some(Value::Array(names)) => {
                let names = names.iter().filter_map(Value::as_str);
                Types::union(names.map(Types::of_name))
            }
            _ => Types::ANY,
        };
        if let Some(Value::Array(values)) = object.get("enum") {
            all = all & Types::union(values.iter().map(Types::of));
        }
        if let Some(value) = object.get("const") {
            all = all & Types::of(value);
        }
        if let Some(schema) = self.referred(object) {
            all = all & self.types(schema, depth - 1);
        }
        for key in ["anyOf", "oneOf"] {
            if let Some(Value::Array(parts)) = object.get(key) {
                let parts = parts.iter().map(|schema| self.types(schema, depth - 1));
                all = all & Types::union(parts);
            }
        }
        if let Some(Value::Array(parts)) = object.get("allOf") {
            for schema in parts {
                all = all & self.types(schema, depth - 1);
            }
        }
        match all {
            // It allows nothing: as good as one that does not say.
            Types::NONE => Types::ANY,
            all => all,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn types_are_found_wherever_a_schema_has_them() {
        let schema = json!({
            "type": "object",
            "$defs": {"Count": {"type": "integer"}, "Self": {"$ref": "#/$defs/Self"}},
            "properties": {
                "text": {"type": "string"},
                "count": {"$ref": "#/$defs/Count"},
                "first": {"$ref": "#/properties/text"},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "several": {"type": ["array", "object"]},
                "one": {"enum": ["a", 1]},
                "fixed": {"const": true},
                "both": {"allOf": [{"type": ["string", "number"]}, {"type": "number"}]},
                "itself": {"$ref": "#/$defs/Self"},
                "nothing": {"allOf": [{"type": "string"}, {"type": "number"}]},
                "untold": {"description": "x"},
                "yes": true,
            },
            "allOf": [{"properties": {"more": {"type": "bool"}}}],
        });
        let tool = Tool::new("f", &schema);
        for (name, types) in [
            ("text", Types::STRING),
            ("count", Types::NUMBER),
            ("first", Types::STRING),
            ("maybe", Types::STRING | Types::NULL),
            ("several", Types::ARRAY | Types::OBJECT),
            ("one", Types::STRING | Types::NUMBER),
            ("fixed", Types::BOOLEAN),
            ("both", Types::NUMBER),
            ("itself", Types::ANY),
            ("nothing", Types::ANY),
            ("untold", Types::ANY),
            ("yes", Types::ANY),
            ("more", Types::BOOLEAN),
            ("absent", Types::ANY),
        ] {
            assert_eq!(tool.types(name), types, "{name}");
        }
    }

    /// Each level of it has many ways to the next one.
    #[test]
    fn a_schema_without_end_is_read_up_to_a_bound() {
        let many: Vec<Value> = (0..50).map(|_| json!({"$ref": "#/$defs/A"})).collect();
        let schema = json!({"$defs": {"A": {"anyOf": many}},
            "properties": {"a": {"$ref": "#/$defs/A"}}, "anyOf": [{"$ref": "#"}, {"$ref": "#"}]});
        assert_eq!(Tool::new("f", &schema).types("a"), Types::ANY);
    }
}
