const { presets } = SwaggerUIBundle;
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#swagger-ui", presets: [presets.apis] });
