//! `query-qmp-schema`: what clients are told of commands, events and types, made from the tables that check them.

use serde_json::{Value, json};

use super::event::EVENTS;
use super::shape::{Field, Shape, nothing};
use super::table::COMMANDS;

/// Builtin types by QMP's name and JSON's.
const BUILTIN: [(&str, &str); 6] = [
    ("any", "value"),
    ("bool", "boolean"),
    ("int", "int"),
    ("null", "null"),
    ("number", "number"),
    ("str", "string"),
];

/// All entities; `own` are the names of the VMM's commands.
pub fn all(own: &[String]) -> Value {
    let mut schema = Schema { entities: Vec::new(), types: Vec::new() };
    for command in &COMMANDS {
        let (takes, gives) = (schema.name_of(&(command.takes)()), schema.name_of(&(command.gives)()));
        let mut entity = json!({"name": command.name, "meta-type": "command", "arg-type": takes, "ret-type": gives});
        if command.oob {
            entity["allow-oob"] = true.into();
        }
        if command.deprecated {
            entity["features"] = json!(["deprecated"]);
        }
        schema.entities.push(entity);
    }
    for name in own {
        let nothing = schema.name_of(&nothing());
        schema.entities.push(json!({"name": name, "meta-type": "command", "arg-type": nothing, "ret-type": "any"}));
    }
    for (name, data) in EVENTS {
        let data = schema.name_of(&data());
        schema.entities.push(json!({"name": name, "meta-type": "event", "arg-type": data}));
    }
    let builtin = BUILTIN.map(|(name, json)| json!({"name": name, "meta-type": "builtin", "json-type": json}));
    schema.entities.extend(builtin);
    schema.entities.into()
}

struct Schema {
    entities: Vec<Value>,
    /// What was described already, without its name; its name is its place.
    types: Vec<Value>,
}

impl Schema {
    /// The name of a type, which is described first if it is new.
    fn name_of(&mut self, shape: &Shape) -> String {
        let described = match shape {
            Shape::Any => return "any".into(),
            Shape::Bool => return "bool".into(),
            Shape::Str => return "str".into(),
            Shape::Int | Shape::U8 | Shape::U64 => return "int".into(),
            Shape::Number => return "number".into(),
            Shape::StrOrNull => json!({"meta-type": "alternate", "members": [{"type": "str"}, {"type": "null"}]}),
            Shape::Enum(words, _) => {
                let members: Vec<Value> = words.iter().map(|word| json!({"name": word})).collect();
                json!({"meta-type": "enum", "members": members, "values": words})
            }
            Shape::List(element) => {
                let element = self.name_of(element);
                return self.add(format!("[{element}]"), json!({"meta-type": "array", "element-type": element}));
            }
            Shape::Object(fields) => {
                let members: Vec<Value> = fields.iter().filter(|f| !f.hidden).map(|f| self.member(f)).collect();
                json!({"meta-type": "object", "members": members})
            }
            Shape::Union(union) => {
                let words = Shape::Enum(union.cases.iter().map(|(word, _)| *word).collect(), Vec::new());
                let members = vec![json!({"name": union.tag, "type": self.name_of(&words)})];
                let case = |(word, shape): &(&str, Shape)| json!({"case": word, "type": self.name_of(shape)});
                let variants: Vec<Value> = union.cases.iter().map(case).collect();
                json!({"meta-type": "object", "members": members, "tag": union.tag, "variants": variants})
            }
        };
        let place = self.types.iter().position(|known| *known == described);
        let place = place.unwrap_or_else(|| {
            self.types.push(described.clone());
            self.types.len() - 1
        });
        self.add(place.to_string(), described)
    }

    fn member(&mut self, field: &Field) -> Value {
        let mut member = json!({"name": field.name, "type": self.name_of(&field.shape)});
        if field.optional {
            member["default"] = Value::Null;
        }
        member
    }

    fn add(&mut self, name: String, mut entity: Value) -> String {
        if !self.entities.iter().any(|known| known["name"] == *name) {
            entity["name"] = name.clone().into();
            self.entities.push(entity);
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_that_is_named_is_described_once() {
        let schema = all(&["quit".to_owned()]);
        let entities = schema.as_array().unwrap();
        let names: Vec<&str> = entities.iter().map(|e| e["name"].as_str().unwrap()).collect();
        let find = |name: &Value| {
            let found: Vec<&Value> = entities.iter().filter(|e| e["name"] == *name).collect();
            assert_eq!(found.len(), 1, "{name} is described {} times", found.len());
            found[0]
        };
        for name in &names {
            find(&json!(name));
        }
        for entity in entities {
            let members = entity["members"].as_array().into_iter().chain(entity["variants"].as_array()).flatten();
            let members = members.filter_map(|m| m.get("type"));
            let own = ["arg-type", "ret-type", "element-type"].iter().filter_map(|key| entity.get(key));
            for name in members.chain(own) {
                find(name);
            }
        }
        let migrate = find(&json!("migrate"));
        let takes = find(&migrate["arg-type"]);
        assert_eq!(takes["members"][0], json!({"name": "uri", "type": "str", "default": null}));
        assert_eq!(find(&json!("migrate-pause"))["allow-oob"], true);
        assert!(!schema.to_string().contains("xbzrle"), "what does not exist is not offered");
    }
}
